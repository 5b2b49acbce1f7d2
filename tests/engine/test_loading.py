"""Each setting of the embedded engine does to the real model what it says, or says why not."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.engines.embedded import llama as door
from proxy.engines.embedded.files import FileError
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.loading import LoadError, state_fingerprint
from proxy.engines.embedded.prompt import Prompter
from proxy.engines.embedded.protocol import Load, Part
from tests.engine.adapters import write_adapter

C = door.C
TEXT = "The capital of France is"
LAYERS, WIDTH = 30, 192
"""SmolLM2-135M: numbers that a cell holds for each of keys and values are LAYERS x WIDTH."""

BYTES_OF_32 = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
}
"""What 32 numbers take."""

ADRIFT = 1e-3
"""Logits. Kernels may add in another order; what a setting changes is a thousand times as much."""


def settings(model_path: str, **changes: Any) -> Load:
    small: dict[str, Any] = dict(n_ctx=256, cache_tokens=256, sequences=2, n_batch=32, n_ubatch=32)
    return Load(path=model_path, **small | dict(threads=1) | changes)


@contextmanager
def loaded(model_path: str, **changes: Any) -> Iterator[Llama]:
    llama = Llama(settings(model_path, **changes))
    try:
        yield llama
    finally:
        llama.close()


def logits(llama: Llama, text: str = TEXT) -> np.ndarray[Any, Any]:
    """Of the token behind the text, evaluated as sequence 0."""
    tokens = llama.tokenize(text, markup=False, first=True)
    assert llama.decode([(0, 0, tokens, True)]) == 0
    row = C.llama_get_logits_ith(llama._context, len(tokens) - 1)
    return np.ctypeslib.as_array(row, shape=(llama.n_vocab,)).copy()


def next_text(llama: Llama) -> str:
    return llama.piece(int(logits(llama).argmax())).decode()


def loaded_logits(model_path: str, **changes: Any) -> np.ndarray[Any, Any]:
    with loaded(model_path, **changes) as llama:
        return logits(llama)


@pytest.fixture(scope="module")
def plain(model_path: str) -> np.ndarray[Any, Any]:
    return loaded_logits(model_path)


# -- the KV cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", BYTES_OF_32)
def test_each_pair_of_cache_types_holds_what_it_should_and_answers(
    model_path: str, keys: str
) -> None:
    size_of_f16, n = {}, 0
    for values in ("f16", *(BYTES_OF_32.keys() - {"f16"})):
        with loaded(model_path, cache_type_k=keys, cache_type_v=values) as llama:
            assert next_text(llama) == " Paris", values
            state, n = len(llama.save_state(0)), llama.end(0)
        size_of_f16 = size_of_f16 or state
        more = BYTES_OF_32[values] - BYTES_OF_32["f16"]
        assert state - size_of_f16 == n * LAYERS * WIDTH * more // 32, values
    assert state > n * LAYERS * WIDTH * (BYTES_OF_32[keys] + BYTES_OF_32[values]) // 32


def test_quantised_values_without_flash_attention_are_refused_by_name(model_path: str) -> None:
    with pytest.raises(LoadError) as caught:
        Llama(settings(model_path, cache_type_v="q8_0", flash_attention="off"))
    message = str(caught.value)
    assert "engine.cache_type_v q8_0, engine.flash_attention off" in message
    assert message.endswith("quantized V cache requires flash_attn to be enabled")
    assert "\n" not in message


def test_a_cache_that_no_machine_holds_is_refused_by_name(model_path: str) -> None:
    with (
        address_space(8 << 30),
        pytest.raises(LoadError, match=r"a KV cache of 16777216 tokens \(n_ctx 16777216, engine"),
    ):
        Llama(settings(model_path, n_ctx=2**24))


@contextmanager
def address_space(more_bytes: int) -> Iterator[None]:
    """No more than this: else a machine that promises more than it has would be asked to keep
    its word.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_flash_attention_is_as_asked_and_told(model_path: str) -> None:
    states = {}
    for asked, told in (("auto", True), ("on", True), ("off", False)):
        with loaded(model_path, flash_attention=asked) as llama:
            assert llama.flash_attention is told
            assert next_text(llama) == " Paris"
            states[asked] = llama.save_state(0)
    with loaded(model_path, flash_attention="on") as llama:
        assert llama.load_state(1, states["auto"])
        assert not llama.load_state(0, states["off"])  # laid out in another way


# -- memory and threads --------------------------------------------------------------------------


def test_the_model_is_mapped_or_read(model_path: str, plain: np.ndarray[Any, Any]) -> None:
    for mmap in (True, False):
        before = maps(model_path)
        with loaded(model_path, mmap=mmap) as llama:
            assert (maps(model_path) > before) is mmap
            assert np.array_equal(logits(llama), plain)


def maps(path: str) -> int:
    """How often the file is mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.endswith(str(Path(path).resolve())) for line in lines)


def test_locked_memory_is_locked_as_far_as_the_system_lets_us(model_path: str) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    before = locked()
    with loaded(model_path, mlock=True) as llama:
        assert next_text(llama) == " Paris"
        may_all = allowed == resource.RLIM_INFINITY or allowed > 2 * Path(model_path).stat().st_size
        assert locked() > before or not may_all


def locked() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmLck:")[2].split()[0])


def test_threads_and_batches_are_as_many_as_asked(model_path: str) -> None:
    with loaded(model_path, threads=3, threads_batch=2, n_batch=64, n_ubatch=16) as llama:
        assert C.llama_n_threads(llama._context) == 3
        assert C.llama_n_threads_batch(llama._context) == 2
        assert (llama.n_batch, llama.n_ubatch) == (64, 16)
    with loaded(model_path, threads=3) as llama:
        assert C.llama_n_threads_batch(llama._context) == 3


def test_settings_for_gpus_do_no_harm_where_there_is_none(
    model_path: str, plain: np.ndarray[Any, Any]
) -> None:
    changes = dict(gpu_layers=-1, main_gpu=1, split_mode="row", tensor_split=(3.0, 1.0))
    if not C.llama_supports_gpu_offload():
        assert np.array_equal(loaded_logits(model_path, **changes), plain)
    with pytest.raises(LoadError, match="SPLIT_MODE_TENSOR"):
        Llama(settings(model_path, split_mode="tensor"))


# -- RoPE ----------------------------------------------------------------------------------------


def test_each_way_to_scale_rope_gives_other_logits(
    model_path: str, plain: np.ndarray[Any, Any]
) -> None:
    ways: list[dict[str, Any]] = [
        dict(rope_freq_base=1000.0),
        dict(rope_scaling="linear", rope_freq_scale=0.25),
        dict(rope_scaling="yarn", rope_freq_scale=0.25),
        dict(rope_scaling="yarn", rope_freq_scale=0.25, yarn_orig_ctx=1024),
        dict(rope_scaling="yarn", rope_freq_scale=0.25, yarn_ext_factor=0.5),
        dict(rope_freq_scale=0.25, yarn_attn_factor=0.9),
        dict(rope_scaling="yarn", rope_freq_scale=0.25, yarn_beta_fast=4.0),
        dict(rope_scaling="yarn", rope_freq_scale=0.25, yarn_beta_slow=4.0),
    ]
    found = [plain, *(loaded_logits(model_path, **way) for way in ways)]
    for i, one in enumerate(found):
        for j, another in enumerate(found[:i]):
            assert np.abs(one - another).max() > ADRIFT, (ways[i - 1], j)
    unscaled = loaded_logits(model_path, rope_scaling="none", rope_freq_scale=0.25)
    assert np.array_equal(unscaled, plain)


# -- LoRA ----------------------------------------------------------------------------------------


def test_an_adapter_changes_what_the_model_says_and_at_scale_0_nothing(
    model_path: str, plain: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a.gguf")
    changed = loaded_logits(model_path, lora=(str(adapter),))
    assert np.abs(changed - plain).max() > 1
    assert changed.argmax() != plain.argmax()
    assert np.array_equal(loaded_logits(model_path, lora=(f"{adapter}:0",)), plain)


def test_adapters_add_up_by_their_scales(model_path: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.gguf")
    other = write_adapter(tmp_path / "b.gguf", seed=2)
    whole = loaded_logits(model_path, lora=(f"{adapter}:1.0",))
    halves = loaded_logits(model_path, lora=(f"{adapter}:0.5", f"{adapter_copy(adapter)}:0.5"))
    assert np.abs(halves - whole).max() < 0.1
    assert np.abs(loaded_logits(model_path, lora=(f"{adapter}:0.5",)) - whole).max() > 1
    assert np.abs(loaded_logits(model_path, lora=(str(adapter), str(other))) - whole).max() > 1


def adapter_copy(path: Path) -> Path:
    copy = path.with_name(f"copy-{path.name}")
    copy.write_bytes(path.read_bytes())
    return copy


def test_an_adapter_that_does_not_fit_is_refused_by_name(model_path: str, tmp_path: Path) -> None:
    foreign = write_adapter(tmp_path / "foreign.gguf", architecture="gemma")
    with pytest.raises(LoadError, match=r"^engine\.lora: the adapter .*foreign\.gguf .*mismatch$"):
        Llama(settings(model_path, lora=(str(foreign),)))
    wide = write_adapter(tmp_path / "wide.gguf", width=64)
    with pytest.raises(LoadError, match=r"^engine\.lora: .*wide\.gguf .*incorrect shape"):
        Llama(settings(model_path, lora=(str(wide),)))
    with pytest.raises(LoadError, match=r"expect general\.type to be 'adapter'"):
        Llama(settings(model_path, lora=(model_path,)))
    with pytest.raises(FileError, match=r"^engine\.lora: the adapter .*none\.gguf cannot be read"):
        Llama(settings(model_path, lora=(str(tmp_path / "none.gguf"),)))


def test_a_model_that_is_cut_short_is_refused_with_the_reason(
    model_path: str, tmp_path: Path
) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(Path(model_path).read_bytes()[: 4 << 20])
    with pytest.raises(LoadError) as caught:
        Llama(settings(str(short)))
    assert "short.gguf: " in str(caught.value)
    assert "corrupted or incomplete" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the chat template ---------------------------------------------------------------------------

SHOUT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def test_a_template_that_is_given_takes_the_place_of_the_models_own(
    model_path: str, tmp_path: Path
) -> None:
    file = tmp_path / "shout.jinja"
    file.write_text(SHOUT)
    prompts = {prompt(model_path, chat_template=given) for given in (SHOUT, str(file))}
    assert prompts == {"<user>Hi\n"}
    assert "<|im_start|>user" in prompt(model_path)


def prompt(model_path: str, **changes: Any) -> str:
    with loaded(model_path, **changes) as llama:
        messages = [Part("user", ("Hi",))]
        tokens = Prompter(llama).tokens(messages, answer_header=False, continues=False)
        return "".join(llama.special_text(token) for token in tokens)


# -- what a state is good for --------------------------------------------------------------------

CELLS_CHANGE: dict[str, Any] = dict(
    cache_type_k="q8_0",
    cache_type_v="q8_0",
    flash_attention="off",
    rope_scaling="yarn",
    rope_freq_base=1000.0,
    rope_freq_scale=0.25,
    yarn_orig_ctx=1024,
    yarn_ext_factor=0.5,
    yarn_attn_factor=0.5,
    yarn_beta_fast=4.0,
    yarn_beta_slow=4.0,
    swa_full=True,
    chat_template=SHOUT,
)
CELLS_STAY: dict[str, Any] = dict(
    sequences=3,
    n_batch=64,
    n_ubatch=16,
    threads=2,
    threads_batch=2,
    gpu_layers=-1,
    main_gpu=1,
    split_mode="row",
    tensor_split=(1.0,),
    mmap=False,
    mlock=True,
    trace_path="t",
    snapshots="s",
    snapshot_bytes=1,
)
BY_THEIR_CONTENT = {"path", "lora"}
BY_THE_SIZE_OF_THE_CACHE = {"n_ctx", "cache_tokens"}


def test_every_setting_is_known_to_change_states_or_not_to(model_path: str) -> None:
    known = [set(CELLS_CHANGE), set(CELLS_STAY), BY_THEIR_CONTENT, BY_THE_SIZE_OF_THE_CACHE]
    assert set(Load.__struct_fields__) == set().union(*known)
    base = state_fingerprint(settings(model_path), cells=256)
    found = {base, state_fingerprint(settings(model_path), cells=512)}
    for name, value in CELLS_CHANGE.items():
        found.add(state_fingerprint(settings(model_path, **{name: value}), cells=256))
    assert len(found) == 2 + len(CELLS_CHANGE)
    for name, value in CELLS_STAY.items():
        assert state_fingerprint(settings(model_path, **{name: value}), cells=256) == base, name


def test_an_adapter_counts_by_its_content_and_scale(model_path: str, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "a.gguf")
    other = write_adapter(tmp_path / "b.gguf", seed=2)

    def named(*lora: str) -> str:
        return state_fingerprint(settings(model_path, lora=lora), cells=256)

    assert len({named(), named(f"{one}"), named(f"{one}:0.5"), named(f"{other}")}) == 4
    assert named(f"{one}") == named(f"{adapter_copy(one)}:1")
    assert named(f"{one}:0") == named()
