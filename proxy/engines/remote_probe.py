"""Asks a server what it is. Every question is bounded by its caller."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import msgspec

from proxy.engines.base import ContextOverflow, EngineError, EngineUnavailable
from proxy.engines.remote_errors import failure
from proxy.engines.remote_http import Http
from proxy.engines.remote_server import (
    ESTIMATE,
    PLACES_OTHER,
    Kind,
    Server,
    Template,
    default_system,
    fingerprint,
    get,
    is_llama_cpp,
    is_llama_server,
    model_name,
    slots,
    template_of,
    window,
)
from proxy.engines.remote_tokenizer import Tokenizer, learned, of_llama_cpp, of_llama_server
from proxy.engines.remote_wire import Message, Upstream

MARK = "chatfold-0123456789"
SAMPLE = 'The quick brown fox, 1234567890: naïve café, 日本語のテキスト, {"a": [1, 2]}\n'
"""Two vocabularies that split this the same way are the same for our purposes."""

LONGEST_PROMPT = " a" * 1_000_000
"""Longer than any window. llama_cpp.server tells its window only when it refuses a prompt, which it
does after tokenizing (half a second here) and before evaluating anything."""

LOADING = 503


@dataclass(frozen=True, slots=True)
class Found:
    """A server, and the way to its tokenizer where it has one."""

    server: Server
    tokenizer: Tokenizer | None


@dataclass(frozen=True, slots=True)
class Probe:
    """`n_ctx` and `model` are what the operator set, 0 and "" where the server decides. With
    `any_key` a server that refuses to say which models it has is taken for one that asks its
    clients for keys of their own."""

    http: Http
    upstream: Upstream
    n_ctx: int = 0
    model: str = ""
    any_key: bool = False

    async def found(self) -> Found:
        """Raises EngineError."""
        refused = (401, 403) if self.any_key else ()
        models = await self._get(self.upstream.models, absent=(404, 405, *refused))
        # Only llama-server has this; whatever others say to it means that they have no such thing.
        everything = set(range(201, 600)) - {LOADING}
        props = await self._get(self.upstream.root + "/props", absent=everything)
        if is_llama_server(props):
            return await self._llama_server(models, props)
        count_status = await self._status(self.upstream.root + "/extras/tokenize/count")
        if is_llama_cpp(models, count_status=count_status):
            return await self._llama_cpp(models)
        return self._other(models)

    async def sight(self) -> tuple[object, ...]:
        """What changes when the server is another one, in two short questions. Raises EngineError.

        llama-server draws a new media marker at each start.
        """
        models = await self._get(self.upstream.models, absent=range(201, 600))
        props = await self._get(self.upstream.root + "/props", absent=range(201, 600))
        names = ("model_path", "build_info", "total_slots", "chat_template", "media_marker")
        settings = get(props, "default_generation_settings", "n_ctx")
        return (model_name(models), settings, *(get(props, name) for name in names))

    # -- the three kinds -------------------------------------------------------------------------

    async def _llama_server(self, models: object, props: object) -> Found:
        tokenizer = await learned(of_llama_server(self.http, self.upstream.root))
        tokens, source = window(models, props, n_ctx=self.n_ctx)
        name = self.model or model_name(models)
        build = get(props, "build_info")
        server = Server(
            kind=Kind.LLAMA_SERVER,
            name=name,
            window_tokens=tokens,
            window_from=source,
            places=slots(props),
            fingerprint=fingerprint(
                Kind.LLAMA_SERVER,
                name,
                get(props, "model_path"),
                get(props, "chat_template"),
                await _sample(tokenizer),
            ),
            template=await self._rendered_template(tokenizer) if tokenizer else Template(),
            counts="/tokenize" if tokenizer else ESTIMATE,
            saves_slots=await self._saves_slots(),
            build=build if isinstance(build, str) else "",
        )
        return Found(server, tokenizer)

    async def _llama_cpp(self, models: object) -> Found:
        tokenizer = await learned(of_llama_cpp(self.http, self.upstream.root))
        name = self.model or model_name(models)
        told = 0 if self.n_ctx else await self._window_by_refusal()
        tokens, source = window(models, None, n_ctx=self.n_ctx, refusal=told)
        server = Server(
            kind=Kind.LLAMA_CPP,
            name=name,
            window_tokens=tokens,
            window_from=source,
            places=1,
            fingerprint=fingerprint(Kind.LLAMA_CPP, name, await _sample(tokenizer)),
            template=await self._answered_template(name, tokenizer) if tokenizer else Template(),
            counts="/extras/tokenize" if tokenizer else ESTIMATE,
        )
        return Found(server, tokenizer)

    def _other(self, models: object) -> Found:
        tokens, source = window(models, None, n_ctx=self.n_ctx)
        name = self.model or model_name(models)
        server = Server(
            kind=Kind.OTHER,
            name=name,
            window_tokens=tokens,
            window_from=source,
            places=PLACES_OTHER,
            fingerprint=f"tiktoken:cl100k_base:{name}",
        )
        return Found(server, None)

    # -- llama-server ----------------------------------------------------------------------------

    async def _rendered_template(self, tokenizer: Tokenizer) -> Template:
        bare = await self.rendered([_user(MARK)])
        if not bare:
            return Template()
        three = await self.rendered([_user(MARK), _assistant(MARK), _user(MARK)])
        marked = await self.rendered([_system(MARK), _user(MARK)])
        texts = [MARK, bare, three or bare, marked or bare]
        text, one, of_three, with_system = [len(await tokenizer.tokens(t)) for t in texts]
        known = template_of(
            one=one, three=of_three, with_system=with_system if marked else None, text=text
        )
        # The system message holds the mark first.
        its_own = default_system(bare=bare, marked=marked, mark=MARK) if marked else ""
        return replace(known, default_system=its_own)

    async def rendered(self, messages: list[Message]) -> str:
        """The prompt that llama-server makes of these messages, "" where it cannot."""
        body = msgspec.json.encode({"messages": messages})
        url = self.upstream.root + "/apply-template"
        async with self.http.exchange("POST", url, body) as answer:
            prompt = get(_json(await answer.body()), "prompt")
        return prompt if answer.status == 200 and isinstance(prompt, str) else ""

    async def _saves_slots(self) -> bool:
        """It answers 501 where slots are not to be saved, and 400 to a file that is not there."""
        url = self.upstream.root + "/slots/0?action=restore"
        body = msgspec.json.encode({"filename": f"{MARK}.none"})
        async with self.http.exchange("POST", url, body) as answer:
            await answer.body()
        return answer.status == 400

    # -- llama_cpp.server ------------------------------------------------------------------------

    async def _answered_template(self, name: str, tokenizer: Tokenizer) -> Template:
        """From the usage of three answers of one token."""
        bare = await self._prompt_tokens(name, [_user(MARK)])
        three = await self._prompt_tokens(name, [_user(MARK), _assistant(MARK), _user(MARK)])
        with_system = await self._prompt_tokens(name, [_system(MARK), _user(MARK)])
        if not bare or not three:
            return Template()
        (text,) = await tokenizer.count([MARK])
        return template_of(one=bare, three=three, with_system=with_system or None, text=text)

    async def _prompt_tokens(self, name: str, messages: list[Message]) -> int:
        """0 where it does not take them."""
        body = {"model": name, "messages": messages, "max_tokens": 1, "stream": False}
        async with self.http.exchange(
            "POST", self.upstream.chat, msgspec.json.encode(body)
        ) as answer:
            told = get(_json(await answer.body()), "usage", "prompt_tokens")
        return told if answer.status == 200 and isinstance(told, int) else 0

    async def _window_by_refusal(self) -> int:
        body = msgspec.json.encode({"prompt": LONGEST_PROMPT, "max_tokens": 1})
        async with self.http.exchange("POST", self.upstream.base + "/completions", body) as answer:
            refusal = failure(answer.status, await answer.body())
        return refusal.window_tokens if isinstance(refusal, ContextOverflow) else 0

    # -- asking ----------------------------------------------------------------------------------

    async def _status(self, url: str) -> int:
        async with self.http.exchange("GET", url) as answer:
            await answer.body()
        return answer.status

    async def _get(self, url: str, *, absent: Collection[int]) -> object:
        """The JSON there, None where there is none."""
        async with self.http.exchange("GET", url) as answer:
            received = await answer.body()
        if answer.status in absent:
            return None
        if answer.status != 200:
            raise _not_now(failure(answer.status, received), answer.status)
        return _json(received)


async def _sample(tokenizer: Tokenizer | None) -> list[int]:
    return await tokenizer.tokens(SAMPLE) if tokenizer else []


def _not_now(error: EngineError, status: int) -> EngineError:
    return EngineUnavailable(str(error)) if status == LOADING else error


def _json(received: bytes) -> object:
    try:
        value: object = msgspec.json.decode(received)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    return value


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system(text: str) -> Message:
    return {"role": "system", "content": text}
