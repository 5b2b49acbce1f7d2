"""What is wrong with a summary that came back: named checks. Pure, and raises on no text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory import names, numbers
from memory.language import JAPANESE, LATIN, has_word_spaces, language, script, sentences, words
from memory.prompts import CHAT, Style, instruction
from memory.transcript import Message

_SCRIPT_OF = {
    "ja": JAPANESE, "japanese": JAPANESE, "日本語": JAPANESE,
    "zh": "chinese", "chinese": "chinese", "中文": "chinese",
    "ko": "korean", "korean": "korean", "한국어": "korean",
    "ru": "cyrillic", "russian": "cyrillic", "ukrainian": "cyrillic", "bulgarian": "cyrillic",
    "greek": "greek", "arabic": "arabic", "hebrew": "hebrew", "thai": "thai", "hindi": "devanagari",
}  # fmt: skip
_LATIN_NAMES = words("en english german french spanish italian portuguese dutch de fr es it pt nl")

LOOP_TIMES = 3
"""A phrase is a loop when it stands this many times in a row (a single word: one time more)."""

LONGEST_LOOP = {True: 30, False: 60}
"""Longest phrase looked for in a loop: in words where they have spaces, else in characters."""

SHORTEST_LOOP_CHARS = 8
"""Without word spaces a loop must fill this many characters: はははは is laughter, not a loop."""

GRAM = {True: 5, False: 10}
"""Length of the n-grams whose repeats are counted: words, or characters without word spaces."""

REPEATED_SHARE = 0.15
"""Share of n-grams that stood before, above which a text repeats itself. Of 128 session summaries
in the LoCoMo data the highest is 0.01; loops of SmolLM2 begin at 0.16."""

SAME_SENTENCE_TIMES = 3
"""A sentence of at least four words, digits apart, may stand this many times less one."""

ECHOED = {True: 8, False: 12}
"""A run of this many words (or characters) of the instruction is an echo of it."""

OPENING_CHARS = 160
"""Refusals and greetings are looked for in this much of the beginning."""

ON_TOPIC_SHARE = 0.3
"""Share of a summary's content words that must come from the source. The lowest of 128 session
summaries in the LoCoMo data (Maharana et al. 2024) is 0.39; SmolLM2 gone astray has 0 to 0.3."""

ON_TOPIC_WORDS = 8
"""Shorter summaries are not measured by their share."""


@dataclass(frozen=True, slots=True)
class _Case:
    """What every check is given. `bare` is the text without what it quotes."""

    text: str
    bare: str
    source: Sequence[Message]
    source_text: str
    n_tokens: int
    style: Style


def check(text: str, source: Sequence[Message], *, n_tokens: int, style: Style) -> tuple[str, ...]:
    """The names of the checks that the text fails, in the order of CHECKS; () means it is good.

    `source` is all that the text may draw on: the messages it stands for and, where the model was
    shown them, earlier summaries and the system prompt as messages of their own. Raises nothing,
    whatever the text; takes time linear in text and source.
    """
    if not any(char.isalnum() for char in text):
        return ("empty",)
    source_text = "\n".join(message.text for message in source)
    case = _Case(text, _QUOTED.sub(" ", text), source, source_text, n_tokens, style)
    return tuple(name for name, fails in CHECKS.items() if fails(case))


def _too_long(case: _Case) -> bool:
    return case.n_tokens > case.style.max_tokens


_QUOTED = re.compile(r'"[^"\n]{0,300}"|“[^”\n]{0,300}”|「[^」\n]{0,300}」|『[^』\n]{0,300}』')
_REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:very |really |so |truly )?(?:sorry|unable|not able|afraid)\b"
    r"|\bI (?:can(?:no|')t|can not|won't|will not|don't have (?:access|enough|the ability)|do not"
    r" have)\b"
    r"|\bas an? (?:\w+ )?(?:AI|language model|assistant)\b|\bI apologi[sz]e\b"
    r"|申し訳(?:ありません|ございません)|お答え(?:できません|できかねます)"
    r"|要約(?:することは)?(?:は)?できません"
    r"|お役に立てません|対応できません|わかりかねます",
    re.IGNORECASE,
)


def _refusal(case: _Case) -> bool:
    opening = case.bare.lstrip()[:OPENING_CHARS].replace("’", "'")
    return bool(_REFUSAL.search(opening))


_TOOL_CALL = re.compile(
    r"</?(?:tool_call|tool_response|function_call|tool_use|invoke)s?\b|<function=|\[/?TOOL_CALLS?\]"
    r"|<\|python_tag\|>|\"(?:arguments|parameters|tool_calls)\"\s*:"
    r"|\A\s*(?:```(?:json)?\s*)?[\[{]\s*[\"{\[][^\n]{0,80}[\":{\[]",
    re.IGNORECASE,
)


def _tool_call(case: _Case) -> bool:
    match = _TOOL_CALL.search(case.text)
    return match is not None and match.group() not in case.source_text


# Templates: ChatML, Llama 2 and 3, Mistral, Gemma, Phi, DeepSeek (whose bars are full width).
_MARKUP = re.compile(
    r"<[|｜][^|｜>\n]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|</?think>"
    r"|^\W{0,4}(?:the )?(?:user|assistant|system|human|bot|me|ai|chatgpt|ユーザー|アシスタント"
    r"|システム|人間)"
    r"\W{0,3}[:：]",
    re.IGNORECASE | re.MULTILINE,
)


def _markup(case: _Case) -> bool:
    return any(
        match.group()[0] not in "<[" or match.group() not in case.source_text
        for match in _MARKUP.finditer(case.text)
    )


def _repetition(case: _Case) -> bool:
    spaced = has_word_spaces(case.text)
    units = _units(case.text, spaced=spaced)
    return (
        _loops(units, spaced=spaced) or _repeats(units, spaced=spaced) or _same_sentences(case.text)
    )


def _units(text: str, *, spaced: bool) -> Sequence[str]:
    return re.findall(r"\w+", text.lower()) if spaced else re.sub(r"\W+", "", text)


def _loops(units: Sequence[str], *, spaced: bool) -> bool:
    """Whether a phrase of length p stands LOOP_TIMES in a row: unit i equals unit i - p so long."""
    for period in range(1, min(LONGEST_LOOP[spaced], len(units) // 2) + 1):
        need = period * (LOOP_TIMES - 1 + (period == 1))
        if not spaced:
            need = max(need, SHORTEST_LOOP_CHARS - period)
        run = 0
        for i in range(period, len(units)):
            run = run + 1 if units[i] == units[i - period] else 0
            if run >= need and not all(u.isdigit() for u in units[i - period + 1 : i + 1]):
                return True
    return False


def _repeats(units: Sequence[str], *, spaced: bool) -> bool:
    n = GRAM[spaced]
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return len(grams) >= 2 * n and len(grams) - len(set(grams)) > REPEATED_SHARE * len(grams)


def _same_sentences(text: str) -> bool:
    plain = (re.sub(r"\d+", "0", sentence.lower()) for _, sentence in sentences(text))
    counts = Counter(s for s in plain if len(s.split()) >= 4 or len(s) >= 20)
    return any(times >= SAME_SENTENCE_TIMES for times in counts.values())


_TO_THE_USER = re.compile(
    r"\A\W*(?:sure|certainly|of course|absolutely|hi|hello|hey|dear|thanks|thank you|you're welcome"
    r"|great question|glad|happy to|here(?:'s| is| are)|let me|let's|i hope|i'd be|i'm (?:here"
    r"|ready|glad|happy)"
    r"|i(?:'ll| will| can)|you can|yes,|no,)\b"
    r"|\blet me know\b|\bfeel free\b|\bI hope this\b|\bhow can I (?:help|assist)\b|\bbest regards\b"
    r"|\A\W*(?:はい、|もちろん|こんにちは|こんばんは|かしこまりました|承知|ありがとうございます"
    r"|わかりました)"
    r"|お手伝い(?:でき|し)ます|ご質問|お知らせください|何かあれば|いかがでしょうか|しましょうか。?",
    re.IGNORECASE,
)
_SPOKEN = re.compile(r"\b(?:you|your|yours|I|I'm|I'll|I've|I'd|my|me)\b|あなた(?!自身)")
SPOKEN_SHARE = 0.34
"""Share of sentences with "I" or "you" outside quotes, above which a text speaks, not notes."""
_ABOUT_THE_TASK = re.compile(
    r"\b(?:asked|asks|wants|requested|want) (?:for )?(?:a|the|to be answered with a) (?:\w+ )?"
    r"(?:summary|report)\b|\bat most \d+ words\b|\bin the third person\b|^\W*(?:this|the)"
    r" (?:summary|response) "
    r"(?:is|should|was)\b",
    re.IGNORECASE | re.MULTILINE,
)


def _echo(case: _Case) -> bool:
    return (
        bool(_TO_THE_USER.search(case.bare.replace("’", "'")))
        or _speaks(case.bare)
        or _repeats_instruction(case)
        or _about_the_task(case)
        or _copies_one_message(case)
    )


def _speaks(bare: str) -> bool:
    all_of_them = [sentence.replace("’", "'") for _, sentence in sentences(bare)]
    spoken = sum(bool(_SPOKEN.search(sentence)) for sentence in all_of_them)
    return spoken > SPOKEN_SHARE * len(all_of_them)


def _repeats_instruction(case: _Case) -> bool:
    asked = instruction(case.style, sample=case.source_text)
    spaced = has_word_spaces(asked)
    n = ECHOED[spaced]
    told, said = _units(asked, spaced=spaced), _units(case.text, spaced=spaced)
    grams = {tuple(told[i : i + n]) for i in range(len(told) - n + 1)}
    return any(tuple(said[i : i + n]) in grams for i in range(len(said) - n + 1))


def _about_the_task(case: _Case) -> bool:
    return any(
        match.group().strip() not in case.source_text
        for match in _ABOUT_THE_TASK.finditer(case.text)
    )


def _copies_one_message(case: _Case) -> bool:
    """Whether the text is nothing but one of several messages, or its beginning, said again."""
    text = case.text.strip()
    return len(case.source) > 1 and any(m.text.strip().startswith(text) for m in case.source)


def _wrong_language(case: _Case) -> bool:
    got, wanted = script(case.text), _wanted_script(case)
    if got and wanted and got != wanted:
        return True
    if case.style.language != CHAT or got != LATIN:
        return False
    mine, theirs = language(case.text), language(case.source_text)
    return bool(mine and theirs) and mine != theirs


def _wanted_script(case: _Case) -> str:
    name = case.style.language.casefold()
    if name == CHAT:
        return script(case.source_text)
    return LATIN if name in _LATIN_NAMES else _SCRIPT_OF.get(name, "")


def _invented_number(case: _Case) -> bool:
    return bool(numbers.unsupported(case.text, numbers.readings(case.source_text)))


def _invented_name(case: _Case) -> bool:
    """Names cannot be followed from one script into another: 京都 is Kyoto."""
    if _translated(case):
        return False
    return bool(names.unknown(case.text, names.known(case.source_text)))


def _translated(case: _Case) -> bool:
    return script(case.text) != script(case.source_text)


def _off_topic(case: _Case) -> bool:
    """Whether most content words are not the source's: a summary of something else, or gibberish.

    Content words are those of five letters or more, or pairs of katakana or kanji.
    """
    if _translated(case) or _other_language_wanted(case):
        return False
    spaced = has_word_spaces(case.text)
    said, known = _content(case.text, spaced=spaced), _content(case.source_text, spaced=spaced)
    return len(said) >= ON_TOPIC_WORDS and len(said & known) < ON_TOPIC_SHARE * len(said)


def _other_language_wanted(case: _Case) -> bool:
    return case.style.language != CHAT and language(case.text) != language(case.source_text)


def _content(text: str, *, spaced: bool) -> set[str]:
    if spaced:
        return {word[:5] for word in re.findall(r"[^\W\d_]{5,}", text.lower())}
    runs = re.findall(r"[\u30a1-\u30faー]{2,}|[\u4e00-\u9fff々]{2,}", text)
    return {run[i : i + 2] for run in runs for i in range(len(run) - 1)}


CHECKS: dict[str, Callable[[_Case], bool]] = {
    "too_long": _too_long,
    "refusal": _refusal,
    "tool_call": _tool_call,
    "markup": _markup,
    "repetition": _repetition,
    "echo": _echo,
    "wrong_language": _wrong_language,
    "invented_number": _invented_number,
    "invented_name": _invented_name,
    "off_topic": _off_topic,
}
"""Every check by name but "empty", after which there is nothing to look at."""
