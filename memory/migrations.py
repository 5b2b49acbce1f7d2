"""The schema, as an append-only list of migrations. A published migration is never edited."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

from memory.store_errors import StoreError, StoreNewer

MIGRATIONS = Migrations("chatfold")


def migrate(db: Database) -> None:
    """Brings the schema up to date; writes nothing where it already is.

    The caller holds a write transaction: sqlite-utils would begin a deferred one, and of several
    processes that start at once all but one would fail when they come to write. Raises StoreNewer.
    """
    refuse_newer(db)
    if MIGRATIONS.pending(db):
        MIGRATIONS.apply(db)


def refuse_newer(db: Database) -> None:
    """Raises StoreNewer if the file has seen a migration that is not in the list. Reads only."""
    unknown = _applied(db) - _known()
    if unknown:
        raise StoreNewer(
            f"the store was written by a newer chatfold (unknown: {', '.join(sorted(unknown))}); "
            "upgrade chatfold, or point it at another file"
        )


def require_current(db: Database) -> None:
    """For those who may not migrate. Raises StoreNewer, or StoreError for an older schema."""
    refuse_newer(db)
    pending = [migration.name for migration in MIGRATIONS.pending(db)]
    if pending:
        raise StoreError(
            f"the store needs to be upgraded first (missing: {', '.join(pending)}); "
            "start chatfold on it once"
        )


def is_current(db: Database) -> bool:
    """Whether nothing is left to apply. Reads only. Raises StoreNewer."""
    refuse_newer(db)
    return not MIGRATIONS.pending(db)


def _applied(db: Database) -> set[str]:
    return {migration.name for migration in MIGRATIONS.applied(db)}


def _known() -> set[str]:
    with Database(memory=True, execute_plugins=False) as empty:
        return {migration.name for migration in MIGRATIONS.pending(empty)}


def _execute_all(db: Database, *statements: str) -> None:
    # Not executescript(): that commits the transaction around it.
    for statement in statements:
        db.execute(statement)


OWNERS = """
CREATE TABLE owners (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE  -- whose data it is; part of every query
)"""

CONVERSATIONS = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY NOT NULL,
    owner INTEGER NOT NULL REFERENCES owners(id),
    created_at REAL NOT NULL,  -- seconds since the epoch, as everywhere below
    updated_at REAL NOT NULL
)"""

MESSAGES = """
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    conversation TEXT NOT NULL REFERENCES conversations(id),
    parent INTEGER REFERENCES messages(id),  -- the message before it; NULL at a root
    depth INTEGER NOT NULL CHECK (depth >= 0),  -- messages before it
    role TEXT NOT NULL,
    text TEXT NOT NULL,
    n_tokens INTEGER NOT NULL,  -- of the text alone, without the template
    tokenizer TEXT NOT NULL,
    token_ids BLOB,  -- little-endian int32, as generated; NULL for a client's text
    digest BLOB NOT NULL,  -- of the whole history up to here
    message_digest BLOB NOT NULL,  -- of this message alone
    unspaced INTEGER NOT NULL,  -- 1: has letters of a script written without spaces
    created_at REAL NOT NULL,
    UNIQUE (owner, digest),
    CHECK ((parent IS NULL) = (depth = 0))
)"""

SUMMARIES = """
CREATE TABLE summaries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    conversation TEXT NOT NULL REFERENCES conversations(id),
    first_depth INTEGER NOT NULL,
    last_depth INTEGER NOT NULL,  -- included
    first_digest BLOB NOT NULL,
    last_digest BLOB NOT NULL,
    rank INTEGER NOT NULL,  -- 0: written from turns; else from the summaries in parents
    parents TEXT NOT NULL,  -- JSON list of summary ids
    text TEXT NOT NULL,
    n_tokens INTEGER NOT NULL,
    tokenizer TEXT NOT NULL,
    made_by TEXT NOT NULL,  -- model, extractive or edited
    model TEXT NOT NULL,
    policy_digest TEXT NOT NULL,
    prompt_version TEXT NOT NULL,
    failed_checks TEXT NOT NULL,  -- JSON list of names
    duration_s REAL NOT NULL,
    created_at REAL NOT NULL,
    activated_at REAL  -- NULL until its context was warm
)"""


SYSTEM_PROMPTS = """
CREATE TABLE system_prompts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    text TEXT NOT NULL,
    UNIQUE (owner, text)
)"""

CLIENT_IDS = """
CREATE TABLE client_ids (
    owner INTEGER NOT NULL REFERENCES owners(id),
    client_id TEXT NOT NULL,  -- the client's own name for the conversation
    conversation TEXT NOT NULL REFERENCES conversations(id),
    PRIMARY KEY (owner, client_id)
)"""


@MIGRATIONS()
def m0001_messages_and_summaries(db: Database) -> None:
    _execute_all(
        db,
        OWNERS,
        CONVERSATIONS,
        MESSAGES,
        SUMMARIES,
        "CREATE INDEX conversations_owner ON conversations(owner)",
        "CREATE INDEX conversations_updated_at ON conversations(updated_at)",
        "CREATE INDEX messages_conversation ON messages(conversation, depth)",
        "CREATE INDEX messages_parent ON messages(parent)",
        "CREATE INDEX messages_message_digest ON messages(owner, message_digest)",
        "CREATE INDEX messages_unspaced ON messages(owner) WHERE unspaced",
        "CREATE INDEX summaries_conversation ON summaries(conversation, first_depth)",
    )


def _full_text(name: str, tokenizer: str, condition: str) -> tuple[str, ...]:
    """An index over messages.text that holds no text itself, and the triggers that keep it true."""
    add = f"INSERT INTO {name}(rowid, text) VALUES (new.id, new.text)"
    drop = f"INSERT INTO {name}({name}, rowid, text) VALUES ('delete', old.id, old.text)"
    when_new, when_old = condition.format(row="new"), condition.format(row="old")
    trigger = f"CREATE TRIGGER {name}_{{}} {{}} ON messages WHEN {{}} BEGIN {{}}; END"
    return (
        f"CREATE VIRTUAL TABLE {name} USING fts5("
        f"text, content='messages', content_rowid='id', tokenize='{tokenizer}')",
        trigger.format("added", "AFTER INSERT", when_new, add),
        trigger.format("deleted", "AFTER DELETE", when_old, drop),
        # BEFORE, because SQLite promises no order among AFTER triggers.
        trigger.format("unwritten", "BEFORE UPDATE OF text, unspaced", when_old, drop),
        trigger.format("rewritten", "AFTER UPDATE OF text, unspaced", when_new, add),
        f"INSERT INTO {name}(rowid, text) SELECT id, text FROM messages "
        f"WHERE {condition.format(row='messages')}",
    )


@MIGRATIONS()
def m0002_search(db: Database) -> None:
    _execute_all(
        db,
        *_full_text("message_words", "unicode61 remove_diacritics 2", "{row}.id > 0"),
        *_full_text("message_trigrams", "trigram", "{row}.unspaced"),
    )


@MIGRATIONS()
def m0003_overviews(db: Database) -> None:
    db.create_view("conversation_overview", _CONVERSATION_OVERVIEW)
    db.create_view("summary_overview", _SUMMARY_OVERVIEW)


@MIGRATIONS()
def m0004_system_prompts_and_client_ids(db: Database) -> None:
    _execute_all(
        db,
        SYSTEM_PROMPTS,
        CLIENT_IDS,
        # The part of the system prompt that stood in front when this user message was answered.
        "ALTER TABLE messages ADD COLUMN front INTEGER REFERENCES system_prompts(id)",
        # The rest of it, which stood right before this message; '' where there was none.
        "ALTER TABLE messages ADD COLUMN note TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX messages_front ON messages(front)",
        "CREATE INDEX client_ids_conversation ON client_ids(conversation)",
    )


PINS = """
CREATE TABLE pins (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    conversation TEXT NOT NULL REFERENCES conversations(id),
    text TEXT NOT NULL,  -- stands in every context of the conversation
    created_at REAL NOT NULL
)"""

ANSWERS = """
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    message INTEGER NOT NULL REFERENCES messages(id),  -- the answer itself
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,  -- of the prompt
    generated_tokens INTEGER NOT NULL,
    queued_s REAL NOT NULL,
    first_token_s REAL NOT NULL,  -- from the request's arrival
    summaries TEXT NOT NULL,  -- JSON list of the ids that the context was made from
    room TEXT NOT NULL,  -- JSON: memory.context.Room
    pinned TEXT NOT NULL,
    context_digest BLOB NOT NULL,  -- of the messages that were sent
    created_at REAL NOT NULL
)"""


@MIGRATIONS()
def m0005_pins_and_answers(db: Database) -> None:
    _execute_all(
        db,
        PINS,
        ANSWERS,
        "CREATE INDEX pins_conversation ON pins(conversation)",
        "CREATE INDEX answers_message ON answers(message)",
    )


REWRITES = """
CREATE TABLE rewrites (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    conversation TEXT NOT NULL REFERENCES conversations(id),
    first_depth INTEGER NOT NULL,
    last_depth INTEGER NOT NULL,  -- included
    last_digest BLOB NOT NULL,
    policy_name TEXT NOT NULL,
    policy TEXT NOT NULL,  -- JSON: its knobs
    before TEXT NOT NULL,  -- JSON list of the summaries that stood for these messages
    created_at REAL NOT NULL,
    finished_at REAL,  -- NULL until all its candidates are written
    used_at REAL  -- NULL until they were copied among the summaries
)"""

CANDIDATES = """
CREATE TABLE candidates (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners(id),
    rewrite INTEGER NOT NULL REFERENCES rewrites(id),
    first_depth INTEGER NOT NULL,
    last_depth INTEGER NOT NULL,
    first_digest BLOB NOT NULL,
    last_digest BLOB NOT NULL,
    rank INTEGER NOT NULL,
    parents TEXT NOT NULL,  -- JSON list of candidate ids
    text TEXT NOT NULL,
    n_tokens INTEGER NOT NULL,
    tokenizer TEXT NOT NULL,
    made_by TEXT NOT NULL,
    model TEXT NOT NULL,
    policy_digest TEXT NOT NULL,
    prompt_version TEXT NOT NULL,
    failed_checks TEXT NOT NULL,
    duration_s REAL NOT NULL,
    created_at REAL NOT NULL,
    UNIQUE (rewrite, first_depth, last_depth)
)"""


@MIGRATIONS()
def m0006_rewrites(db: Database) -> None:
    _execute_all(
        db,
        REWRITES,
        CANDIDATES,
        "CREATE INDEX rewrites_conversation ON rewrites(conversation)",
        # Of several that begin at one message those of the greatest generation stand for it.
        "ALTER TABLE summaries ADD COLUMN generation INTEGER NOT NULL DEFAULT 0",
    )


BEGINS_CHARS = 80

_FIRST = "FROM messages WHERE conversation = {id} ORDER BY depth, id LIMIT 1"
_BEGINS = f"coalesce((SELECT substr(text, 1, {BEGINS_CHARS}) {_FIRST}), '')"


def _keeps_begins(when: str, row: str, condition: str) -> str:
    """A trigger on messages that keeps conversations.begins true, without a word of what is
    gone."""
    id_ = f"{row}.conversation"
    return (
        f"CREATE TRIGGER conversations_begin_{when.split()[1].lower()} {when} ON messages "
        f"WHEN {condition} BEGIN UPDATE conversations SET begins = {_BEGINS.format(id=id_)} "
        f"WHERE id = {id_}; END"
    )


_IS_FIRST = f"(SELECT id {_FIRST.format(id='new.conversation')}) = new.id"
_WAS_FIRST = (
    "NOT EXISTS (SELECT 1 FROM messages WHERE conversation = old.conversation "
    "AND (depth, id) < (old.depth, old.id))"
)


@MIGRATIONS()
def m0007_labels(db: Database) -> None:
    """What people call a row by, for who browses the file with Datasette. The generated columns
    take no room in it."""
    _execute_all(
        db,
        "ALTER TABLE conversations ADD COLUMN begins TEXT NOT NULL DEFAULT ''",
        f"UPDATE conversations SET begins = {_BEGINS.format(id='conversations.id')}",
        _keeps_begins("AFTER INSERT", "new", _IS_FIRST),
        _keeps_begins("AFTER UPDATE OF text", "new", _IS_FIRST),
        _keeps_begins("AFTER DELETE", "old", _WAS_FIRST),
        f"ALTER TABLE owners ADD COLUMN name TEXT AS ({_OWNER_NAME})",
        "ALTER TABLE messages ADD COLUMN label TEXT AS "
        "('#' || depth || ' ' || role || ': ' || substr(text, 1, 60))",
        "ALTER TABLE summaries ADD COLUMN label TEXT AS "
        "('messages ' || first_depth || ' to ' || last_depth || ': ' || substr(text, 1, 60))",
        "ALTER TABLE system_prompts ADD COLUMN label TEXT AS "
        "(CASE text WHEN '' THEN '(none)' ELSE substr(text, 1, 60) END)",
        "ALTER TABLE rewrites ADD COLUMN label TEXT AS "
        "('messages ' || first_depth || ' to ' || last_depth || ' under ' || policy_name)",
        "DROP VIEW conversation_overview",
        "DROP VIEW summary_overview",
    )
    db.create_view("conversation_overview", _LABELLED_CONVERSATIONS)
    db.create_view("message_overview", _MESSAGE_OVERVIEW)
    db.create_view("summary_overview", _LABELLED_SUMMARIES)
    db.create_view("answer_overview", _ANSWER_OVERVIEW)


# An owner's key is 24 hexadecimal digits of the API key and, behind a colon, 24 of the user's id.
_OWNER_NAME = (
    "'key ' || substr(key, 1, 8) "
    "|| CASE WHEN instr(key, ':') THEN ' user ' || substr(key, instr(key, ':') + 1, 8) ELSE '' END"
)

_LABELLED_CONVERSATIONS = """
SELECT conversations.id AS conversation, begins AS begins_with, owners.name AS owner,
    datetime(created_at, 'unixepoch') AS began_utc,
    datetime(updated_at, 'unixepoch') AS last_message_utc,
    (SELECT count(*) FROM messages WHERE conversation = conversations.id) AS messages,
    (SELECT max(depth) + 1 FROM messages WHERE conversation = conversations.id) AS longest_branch,
    (SELECT count(*) FROM summaries WHERE conversation = conversations.id) AS summaries,
    (SELECT count(*) FROM pins WHERE conversation = conversations.id) AS pins
FROM conversations JOIN owners ON owners.id = conversations.owner
ORDER BY updated_at DESC"""

_MESSAGE_OVERVIEW = """
SELECT messages.id, messages.conversation, conversations.begins AS begins_with,
    owners.name AS owner, depth, role, text, n_tokens, note, messages.parent,
    lower(hex(digest)) AS digest, datetime(messages.created_at, 'unixepoch') AS said_utc
FROM messages JOIN conversations ON conversations.id = messages.conversation
    JOIN owners ON owners.id = messages.owner
ORDER BY messages.id"""

_LABELLED_SUMMARIES = """
SELECT summaries.id, summaries.conversation, conversations.begins AS begins_with,
    owners.name AS owner, first_depth || '-' || last_depth AS span, rank, made_by, model, n_tokens,
    failed_checks, round(duration_s, 2) AS duration_s,
    datetime(summaries.created_at, 'unixepoch') AS created_utc,
    datetime(activated_at, 'unixepoch') AS activated_utc, text
FROM summaries JOIN conversations ON conversations.id = summaries.conversation
    JOIN owners ON owners.id = summaries.owner
ORDER BY summaries.conversation, first_depth, summaries.id"""

# A turn begins at a root, and at a user's message that does not follow another one
# (memory.transcript.turn_starts).
_ANSWER_OVERVIEW = """
WITH RECURSIVE place(id, role, turn) AS (
    SELECT id, role, 1 FROM messages WHERE parent IS NULL
    UNION ALL
    SELECT messages.id, messages.role,
        place.turn + (messages.role = 'user' AND place.role <> 'user')
    FROM place JOIN messages ON messages.parent = place.id
)
SELECT answers.id, messages.conversation, conversations.begins AS begins_with,
    owners.name AS owner, place.turn, answers.message,
    prompt_tokens - cached_tokens AS evaluated_tokens, cached_tokens, generated_tokens,
    round(queued_s, 3) AS queued_s, round(first_token_s, 3) AS first_token_s, answers.summaries,
    datetime(answers.created_at, 'unixepoch') AS answered_utc
FROM answers JOIN place ON place.id = answers.message
    JOIN messages ON messages.id = answers.message
    JOIN conversations ON conversations.id = messages.conversation
    JOIN owners ON owners.id = answers.owner
ORDER BY messages.conversation, place.turn, answers.id"""

_CONVERSATION_OVERVIEW = """
SELECT conversations.id AS conversation, owners.key AS owner,
    datetime(conversations.created_at, 'unixepoch') AS began_utc,
    datetime(conversations.updated_at, 'unixepoch') AS last_message_utc,
    (SELECT count(*) FROM messages WHERE conversation = conversations.id) AS messages,
    (SELECT max(depth) + 1 FROM messages WHERE conversation = conversations.id) AS longest_branch,
    (SELECT count(*) FROM summaries WHERE conversation = conversations.id) AS summaries,
    (SELECT substr(text, 1, 80) FROM messages WHERE conversation = conversations.id
        ORDER BY depth, id LIMIT 1) AS begins_with
FROM conversations JOIN owners ON owners.id = conversations.owner
ORDER BY conversations.updated_at DESC"""

_SUMMARY_OVERVIEW = """
SELECT summaries.id, summaries.conversation, owners.key AS owner,
    first_depth || '-' || last_depth AS span, rank, made_by, model, n_tokens, failed_checks,
    round(duration_s, 2) AS duration_s, datetime(created_at, 'unixepoch') AS created_utc,
    datetime(activated_at, 'unixepoch') AS activated_utc, text
FROM summaries JOIN owners ON owners.id = summaries.owner
ORDER BY summaries.conversation, first_depth, summaries.id"""
