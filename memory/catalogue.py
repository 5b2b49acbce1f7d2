"""What the tables of the store hold, in words, as metadata for Datasette. Pure.

https://docs.datasette.io/en/stable/metadata.html
"""

from __future__ import annotations

from typing import Any

HIDDEN = ("_sqlite_migrations", "sqlite_sequence")
SECONDS = "s"

LABELS = {
    "owners": "name",
    "conversations": "begins",
    "messages": "label",
    "summaries": "label",
    "system_prompts": "label",
    "rewrites": "label",
}
"""The column that stands for a row where another table refers to it."""

SORTED = {"conversations": "updated_at", "summaries": "id", "answers": "id", "messages": "id"}
"""The newest first."""

_EPOCH = "seconds since 1970-01-01 UTC; the overviews have it as a date"
_OWNER = "whose it is"
_CONVERSATION = "the conversation it is of"
_TOKENIZER = "whose tokens n_tokens counts: tokenizer and model"
_BEGINS = "the beginning of the conversation's first message"
_OWNER_NAME = "whose it is: the beginnings of the digests of API key and user id"

_AS_IN_SUMMARIES = (
    *("first_depth", "last_depth", "first_digest", "last_digest", "rank", "text", "n_tokens"),
    *("tokenizer", "made_by", "model", "policy_digest", "prompt_version", "failed_checks"),
    "duration_s",
)

TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "owners": (
        "Whose data there is. An owner is an API key, and where the client sends one a user's id.",
        {
            "id": "",
            "key": "digests of the API key and of the user's id, as `chatfold inspect owners` "
            "prints it; neither can be read from it",
            "name": "the beginning of both digests",
        },
    ),
    "conversations": (
        "Trees of messages that grew from one first message each.",
        {
            "id": "a digest of owner and first message",
            "owner": _OWNER,
            "created_at": _EPOCH,
            "updated_at": f"when it grew last: {_EPOCH}",
            "begins": _BEGINS,
        },
    ),
    "messages": (
        "Every message that was said. A branch is the way from one without children to its root.",
        {
            "id": "",
            "owner": _OWNER,
            "conversation": _CONVERSATION,
            "parent": "the message before it; none at a root",
            "depth": "how many messages stand before it",
            "role": "user, assistant or tool",
            "text": "as it was said; a call of a tool is a block of JSON in it",
            "n_tokens": "tokens of text and note, without the template's; -1: not counted yet",
            "tokenizer": _TOKENIZER,
            "token_ids": "the tokens that an answer was generated as: little-endian int32",
            "digest": "digest of the whole history up to here",
            "message_digest": "digest of this message alone",
            "unspaced": "1: has letters of a script that is written without spaces",
            "created_at": _EPOCH,
            "front": "the system prompt that stood in front when this message was answered",
            "note": "the part of the system prompt that stood right before this message",
            "label": "what this row is called in other tables",
        },
    ),
    "summaries": (
        "Texts that stand for a span of messages. The newest ones of a span are in use.",
        {
            "id": "",
            "owner": _OWNER,
            "conversation": _CONVERSATION,
            "first_depth": "depth of the first message it stands for",
            "last_depth": "depth of the last one, included",
            "first_digest": "digest of the history up to the first one",
            "last_digest": "digest of the history up to the last one: it holds on branches "
            "through there",
            "rank": "0: written from turns; higher: from the summaries in parents",
            "parents": "JSON list of the ids of the summaries it was made from",
            "text": "",
            "n_tokens": "tokens of the text",
            "tokenizer": _TOKENIZER,
            "made_by": "model; extractive: sentences of the chat itself; edited: by hand",
            "model": "the model that wrote it",
            "policy_digest": "digest of the policy it was written under",
            "prompt_version": "version of the instruction it was written by",
            "failed_checks": "JSON list of the checks that the model's own text failed",
            "duration_s": "how long it took to write",
            "created_at": _EPOCH,
            "activated_at": f"when its context was warm; none: not yet. {_EPOCH}",
            "generation": "of several that begin at one message those of the greatest stand for it",
            "label": "what this row is called in other tables",
        },
    ),
    "rewrites": (
        "Sets of summaries written again under another policy, to be compared and perhaps used.",
        {
            "id": "",
            "owner": _OWNER,
            "conversation": _CONVERSATION,
            "first_depth": "depth of the first message of the stretch",
            "last_depth": "depth of the last one, included",
            "last_digest": "digest of the history up to the last one",
            "policy_name": "the policy",
            "policy": "JSON: its knobs",
            "before": "JSON list of the ids of the summaries that stood there",
            "created_at": _EPOCH,
            "finished_at": f"when all were written; none: not yet. {_EPOCH}",
            "used_at": f"when they were taken among the summaries; none: never. {_EPOCH}",
            "label": "what this row is called in other tables",
        },
    ),
    "candidates": (
        "The summaries of such a set.",
        {
            "id": "",
            "owner": _OWNER,
            "rewrite": "the set it is of",
            **{name: "as in summaries" for name in _AS_IN_SUMMARIES},
            "parents": "JSON list of the ids of the candidates it was made from",
            "created_at": _EPOCH,
        },
    ),
    "answers": (
        "What each answer cost, and what its context was made from.",
        {
            "id": "",
            "owner": _OWNER,
            "message": "the answer itself",
            "prompt_tokens": "tokens of the whole prompt",
            "cached_tokens": "of these, tokens that came from the cache",
            "generated_tokens": "tokens of the answer",
            "queued_s": "how long it waited for others",
            "first_token_s": "from the request's arrival to the first token",
            "summaries": "JSON list of the ids of the summaries in its context",
            "room": "JSON: tokens that there was room for (memory.context.Room)",
            "pinned": "the pinned facts as they stood in the context",
            "context_digest": "digest of the messages that were sent",
            "created_at": _EPOCH,
        },
    ),
    "pins": (
        "Facts that stand in every context of their conversation.",
        {
            "id": "",
            "owner": _OWNER,
            "conversation": _CONVERSATION,
            "text": "the fact",
            "created_at": _EPOCH,
        },
    ),
    "system_prompts": (
        "The lasting parts of the clients' system prompts.",
        {
            "id": "",
            "owner": _OWNER,
            "text": "",
            "label": "what this row is called in other tables",
        },
    ),
    "client_ids": (
        "What clients themselves call a conversation.",
        {
            "owner": _OWNER,
            "client_id": "the client's own name for it",
            "conversation": "what it is here",
        },
    ),
    "conversation_overview": (
        "Conversations with counts and dates, the one that grew last first.",
        {
            "conversation": "its id",
            "begins_with": _BEGINS,
            "owner": _OWNER_NAME,
            "began_utc": "",
            "last_message_utc": "",
            "messages": "of all branches",
            "longest_branch": "messages of the longest branch",
            "summaries": "in use or not",
            "pins": "pinned facts",
        },
    ),
    "message_overview": (
        "Messages in the order they came, with dates, and digests that can be read.",
        {
            "id": "",
            "conversation": _CONVERSATION,
            "begins_with": _BEGINS,
            "owner": _OWNER_NAME,
            "depth": "how many messages stand before it",
            "role": "user, assistant or tool",
            "text": "as it was said",
            "n_tokens": "tokens of text and note; -1: not counted yet",
            "note": "the part of the system prompt that stood right before it",
            "parent": "id of the message before it",
            "digest": "digest of the whole history up to here; --leaf of `chatfold inspect`",
            "said_utc": "",
        },
    ),
    "summary_overview": (
        "Summaries with their spans and dates.",
        {
            "id": "",
            "conversation": _CONVERSATION,
            "begins_with": _BEGINS,
            "owner": _OWNER_NAME,
            "span": "depths of the first and the last message it stands for",
            "rank": "0: written from turns; higher: from other summaries",
            "made_by": "model; extractive: sentences of the chat itself; edited: by hand",
            "model": "the model that wrote it",
            "n_tokens": "tokens of the text",
            "failed_checks": "JSON list of the checks that the model's own text failed",
            "duration_s": "how long it took to write",
            "created_utc": "",
            "activated_utc": "when its context was warm; none: not yet",
            "text": "",
        },
    ),
    "answer_overview": (
        "What each answer cost, by turn.",
        {
            "id": "",
            "conversation": _CONVERSATION,
            "begins_with": _BEGINS,
            "owner": _OWNER_NAME,
            "turn": "the turn on its branch, counted from 1",
            "message": "id of the answer",
            "evaluated_tokens": "tokens of the prompt that were not in the cache",
            "cached_tokens": "tokens that were",
            "generated_tokens": "tokens of the answer",
            "queued_s": "how long it waited for others",
            "first_token_s": "from the request's arrival to the first token",
            "summaries": "JSON list of the ids of the summaries in its context",
            "answered_utc": "",
        },
    ),
}
"""Of each table and view: what it holds, and of each column ("" where its name says it all)."""

QUERIES = {
    "conversations_with_turns": (
        "Conversations with turns",
        "Turns of all branches, tokens said, summaries in use.",
        """
SELECT conversations.id AS conversation, conversations.begins, owners.name AS owner,
    datetime(conversations.updated_at, 'unixepoch') AS last_message_utc,
    count(*) AS messages, sum(messages.role = 'user') AS questions,
    sum(max(messages.n_tokens, 0)) AS tokens,
    (SELECT count(*) FROM summaries WHERE conversation = conversations.id
        AND activated_at IS NOT NULL) AS summaries_once_used
FROM conversations JOIN owners ON owners.id = conversations.owner
    JOIN messages ON messages.conversation = conversations.id
GROUP BY conversations.id ORDER BY conversations.updated_at DESC""",
    ),
    "summaries_and_spans": (
        "Summaries and the spans they stand for",
        "Of one conversation (its id), or with nothing given of all.",
        """
SELECT conversation, begins_with, id, rank, span, made_by, n_tokens, failed_checks, duration_s,
    activated_utc, text
FROM summary_overview WHERE :conversation IN ('', conversation)
ORDER BY conversation, rank DESC, id""",
    ),
    "tokens_per_turn": (
        "Tokens evaluated per turn",
        "Of one conversation (its id), or with nothing given of all. A turn that was answered "
        "several times, or called tools, tells the sum.",
        """
SELECT conversation, begins_with, turn, sum(evaluated_tokens) AS evaluated_tokens,
    sum(cached_tokens) AS cached_tokens, sum(generated_tokens) AS generated_tokens,
    min(first_token_s) AS first_token_s
FROM answer_overview WHERE :conversation IN ('', conversation)
GROUP BY conversation, turn ORDER BY conversation, turn""",
    ),
    "conversation_in_order": (
        "A conversation in order",
        "Every message of one conversation (its id), all branches.",
        """
SELECT id, parent, depth, role, text, n_tokens, said_utc FROM message_overview
WHERE conversation = :conversation ORDER BY depth, id""",
    ),
}


def metadata(database: str) -> dict[str, Any]:
    """Titles, descriptions, units, labels and queries for Datasette. `database` is the name that
    it gives the file."""
    tables: dict[str, Any] = {name: _table(name) for name in TABLES}
    tables |= {name: {"hidden": True} for name in HIDDEN}
    tables["messages"] |= {"fts_table": "message_words", "fts_pk": "id"}
    return {
        "title": "chatfold",
        "description": "What chatfold remembers of each chat. Nothing can be changed here.",
        "databases": {
            database: {
                "description": "Begin with the overviews, and the queries below.",
                "tables": tables,
                "queries": {
                    name: {"title": title, "description": description, "sql": sql.strip()}
                    for name, (title, description, sql) in QUERIES.items()
                },
            }
        },
    }


def _table(name: str) -> dict[str, Any]:
    description, columns = TABLES[name]
    units = {column: SECONDS for column in columns if column.endswith("_s")}
    value: dict[str, Any] = {
        "description": description,
        "columns": {column: told for column, told in columns.items() if told},
        "units": units,
    }
    if label := LABELS.get(name):
        value["label_column"] = label
    if newest := SORTED.get(name):
        value["sort_desc"] = newest
    return value
