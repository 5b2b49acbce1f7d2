"""What a user told the assistant to do from now on. Pure.

Word for word and by plain patterns: such a sentence must outlive every summary ("call me Kenji",
"respond only in JSON"). A pattern needs both an order and a sign that it is about how to answer, or
that it is to last; "I always forget my keys" and "don't add salt yet" are neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from memory.language import sentences
from memory.transcript import USER, Message

_LEAD = (
    r"(?:^|[,;:(—–-]\s*|\b(?:please|and|but|also|so|then|ok|okay|just|hey|hi|thanks|oh)[,!]?\s+)"
)
"""Where an order may begin: a clause, or a word that leads up to one."""

_ANSWER = (
    r"(?:answer|reply|respond|write|speak|talk|explain|say(?! never)|call|address|use|give(?! up)"
    r"|show|include|add|mention"
    r"|apologi[sz]e|ask|end|start|begin|finish|keep|format|quote|translate|be|treat|assume|remember"
    r"|avoid|suggest|recommend|tell|make(?! us)|put|convert|cite|check|round|list|sign|spell|stay"
    r"|refer|repeat)"
)
_SPEAK = r"(?:answer|reply|respond|write|speak|talk|explain|communicate|summari[sz]e)"
_FORM = (
    r"(?:english|french|german|spanish|italian|portuguese|dutch|japanese|chinese|korean|russian"
    r"|arabic"
    r"|hindi|polish|turkish|swedish|latin|json|yaml|xml|csv|html|markdown|plain (?:text|english)"
    r"|bullet"
    r"|bullets|prose|verse|rhyme|haiku|lower\s?case|upper\s?case|caps|capitals|metric|imperial"
    r"|tables?"
    r"|one|two|three|a single|single|short|simple|brief|full|complete|first person|third person)"
)
_LASTING = (
    r"(?:from (?:now|here|this point) on|going forward|from today|for the rest of (?:this|our|the)"
    r" (?:chat|conversation)|in (?:all |every |any )?(?:of )?(?:your|future|each)(?: future)?"
    r" (?:answers?|repl(?:y|ies)|responses?|messages?)|(?:every|each) (?:answer|reply|response"
    r"|time you))"
)

_ENGLISH = (
    rf"{_LEAD}(?:always|never|only|do not ever|don't ever)\s+{_ANSWER}\b",
    rf"\byou (?:must|should|shall|can|may)?\s?(?:always|never|only)\s+{_ANSWER}\b",
    rf"{_LEAD}(?:don't|do not|stop|avoid|no more|quit)\s+(?:ever\s+)?(?:us|answer|reply|respond"
    rf"|writ|speak"
    r"|say|call|apologi[sz]|repeat|explain|suggest|recommend|mention|ask)(?:e|ing|s|ling)?\b",
    rf"^(?!.*\b(?:I|we)(?:'ll| will)\b)(?:.*\b{_LASTING}\b.*\b{_ANSWER}\b"
    rf"|.*\b{_ANSWER}\b.*\b{_LASTING}\b)",
    rf"{_LEAD}(?:(?:you )?(?:can|could|may) )?(?:(?:please|always|only|just)\s+)?{_SPEAK}\b"
    rf"(?:\s+\w+){{0,3}}\s+(?:in|with|as)\s+(?:only\s+)?(?:the\s+)?{_FORM}\b",
    r"\b(?:call|address) me\s+(?!back|when|if|at|on|tomorrow|later|today|tonight|again|an?\b"
    r"|crazy|asap"
    r"|anytime|in\b|before|after|by phone|and\b|or\b|for\b|every|paranoid|old)[^\s.,!?]",
    rf"{_LEAD}(?:use|stick to|prefer)\s+(?:only\s+|the\s+)?(?:metric|imperial|british|american"
    rf"|celsius"
    r"|fahrenheit|24|12|iso|formal|informal|simple|plain|short|bullet|si)\b",
    r"\bno emojis?\b",
    rf"{_LEAD}(?:keep|make)\s+(?:all\s+|all of\s+)?(?:your\s+|the\s+)?(?:answers?|repl(?:y|ies)"
    rf"|responses?"
    r"|it|them|things)\s+(?:\w+\s+)?(?:short|brief|concise|simple|formal|under|below|polite"
    r"|casual|long|to)\b",
    rf"{_LEAD}(?:remember|keep in mind|bear in mind|note|don't forget|do not forget)"
    rf"(?:\s*:|\s+(?:that\s+)?(?:i|i'm|i've|my|we|we're|our|all|always)\b|\s+to\s+{_ANSWER}\b)",
    rf"{_LEAD}keep (?:that|this|it) in mind\b",
    rf"\bmake sure (?:that )?(?:you|to)\s+(?:always|never)\b|\bi want you to (?:always|never"
    rf"|{_ANSWER})\b",
    r"\bi(?: prefer| want| need| would like|'d like) (?:to have )?(?:all )?(?:your |the"
    r" )?(?:answers|replies|responses)\b",
)
# The commonest ways to say "always answer" and "from now on" in French, German and Spanish.
_EUROPEAN = (
    r"\b(?:réponds?|répondez|écris|parle|appelle)[- ]?(?:moi)?\b.*\b(?:toujours|en français|en"
    r" anglais)\b",
    r"\b(?:toujours|ne .{0,12}jamais)\b.*\b(?:répon|écri|parl)|\bappelle[sz]?-moi\b|\bdésormais\b"
    r"|\bà partir de maintenant\b",
    r"\b(?:antworte|schreib|sprich)\w*\b.*\b(?:immer|nur|auf deutsch|auf englisch|bitte auf)\b"
    r"|\bnenn(?:e|en sie)? mich\b|\b(?:ab jetzt|von jetzt an|ab sofort)\b",
    r"\b(?:responde|contesta|escribe|habla)\w*\b.*\b(?:siempre|solo|sólo|en español|en inglés)\b"
    r"|\bllámame\b|\b(?:a partir de ahora|de ahora en adelante)\b",
)
_REQUEST = (
    r"(?:ください|下さい|お願い|して(?:ね|よ|ほしい|欲しい)|しないで|ないで|てほしい|て欲しい"
    r"|なさい|こと[。！]?$"
    r"|[てで](?:ね|よ)?[。！!]?$|せよ|しろ|くれ[。！]?$|もらえ|いただけ|頂け|頼みます|頼む)"
)
_JAPANESE = (
    rf"(?:これから|今後|以後|以降|次から|次回から|毎回|常に|いつも|必ず|絶対|二度と|ずっと"
    rf"|今から).*{_REQUEST}",
    r"(?:と|って)(?:お)?呼(?:んで|び|ぶよう)",
    r"(?:敬語|タメ口|ため口|丁寧語|関西弁|標準語|日本語|英語|中国語|韓国語|フランス語|ドイツ語"
    r"|スペイン語"
    r"|箇条書き|JSON|マークダウン|Markdown|表形式|一言|短く|簡潔に|詳しく|絵文字|顔文字|専門用語"
    r"|カタカナ)"
    rf".{{0,12}}(?:答え|回答|返事|返信|話し|書[いか]|返し|使[いわっ]|出力|説明|まとめ|{_REQUEST})",
    rf"(?:回答|返事|返答|説明|答え)は.*{_REQUEST}",
    r"覚えて(?:おいて|いて|ね|ください)|忘れないで",
)
_ORDERS = tuple(re.compile(p, re.IGNORECASE) for p in (*_ENGLISH, *_EUROPEAN)) + tuple(
    re.compile(p) for p in _JAPANESE
)
_QUESTION = re.compile(
    r"^(?:do|does|did|have|has|is|are|was|were|why|what|when|where|who|how|which|should|would"
    r"|will|can i"
    r"|could i|do you remember)\b.*\?[\"')\]]*$|(?:です|ます|ません|でしょう|ました|る"
    r"|の)か[?？。]?$",
    re.IGNORECASE,
)


def standing_instructions(source: Iterable[Message]) -> tuple[str, ...]:
    """The sentences of the user's messages that give a lasting order, word for word.

    In the order they were given; said twice, a sentence stands where it was said last. Code blocks
    and the assistant's messages are not read.
    """
    found: dict[str, None] = {}
    for message in source:
        for sentence in _spoken_by_user(message):
            if is_standing(sentence):
                found.pop(sentence, None)
                found[sentence] = None
    return tuple(found)


def is_standing(sentence: str) -> bool:
    """Whether one sentence gives a lasting order."""
    plain = sentence.replace("’", "'")
    return not _QUESTION.search(plain) and any(order.search(plain) for order in _ORDERS)


def _spoken_by_user(message: Message) -> Sequence[str]:
    if message.role != USER:
        return ()
    return [sentence for _, sentence in sentences(message.text)]
