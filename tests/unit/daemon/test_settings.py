"""Where a setting comes from, and what the operator is told about one that cannot be used."""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from ngpu_daemon.settings import (
    ConfigurationError,
    DaemonSettings,
    Section,
    load_settings,
    nearest,
    sample_toml,
    toml_value,
)

PREFIX = "NGPU_SAMPLE_"


class Mode(StrEnum):
    OPEN = "open"
    APPROVED = "approved"


class Limits(Section):
    body_bytes: int = Field(1000, gt=0, description="Largest request body, in bytes.")
    note: str | None = Field(None, description="Shown to clients.", examples=["none"])


class Trusted(Section):
    address: str = Field(description="Its address.", examples=["0x00"])
    multiaddrs: tuple[str, ...] = Field((), description="Where it listens.")


class Sample(DaemonSettings):
    data_dir: Path = Field(Path("/var/lib/sample"), description="Where state is kept.")
    slots: int = Field(4, ge=1, description="Tasks at once.\nEach holds a GPU.")
    mode: Mode = Field(Mode.OPEN, description="Who is admitted.")
    listen: tuple[str, ...] = Field(("/ip4/127.0.0.1/tcp/0",), description="Multiaddrs.")
    trusted: tuple[Trusted, ...] = Field((), description="Bootstraps.")
    limits: Limits = Field(Limits(), description="What is too much.")

    @field_validator("listen")
    @classmethod
    def _starts_with_a_slash(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not item.startswith("/") for item in value):
            raise ValueError("a multiaddr starts with a slash")
        return value


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "sample.toml"


def problems(config: Path | None, overrides: dict[str, Any] | None = None, prefix: str = PREFIX) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(Sample, config, prefix, overrides)
    return caught.value.problems


# -- precedence --------------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_defaults() -> None:
    assert load_settings(Sample) == Sample()


def test_flags_beat_environment_beats_file_beats_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('slots = 2\nmode = "approved"\nlisten = ["/file"]\n')
    monkeypatch.setenv("NGPU_SAMPLE_SLOTS", "3")
    monkeypatch.setenv("NGPU_SAMPLE_LISTEN", '["/environment"]')
    loaded = load_settings(Sample, config, PREFIX, {"slots": 5, "listen": None})
    assert (loaded.slots, loaded.listen, loaded.mode) == (5, ("/environment",), Mode.APPROVED)
    assert loaded.data_dir == Path("/var/lib/sample")


def test_tables_are_merged_key_by_key(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('[limits]\nbody_bytes = 7\nnote = "file"\n')
    monkeypatch.setenv("NGPU_SAMPLE_LIMITS__NOTE", "environment")
    assert load_settings(Sample, config, PREFIX).limits == Limits(body_bytes=7, note="environment")


def test_the_environment_is_left_alone_without_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTS", "9")
    monkeypatch.setenv("NGPU_SAMPLE_SLOTS", "9")
    assert load_settings(Sample).slots == 4
    assert Sample().slots == 4


def test_settings_are_frozen() -> None:
    settings = load_settings(Sample)
    with pytest.raises(ValidationError):
        settings.slots = 5
    with pytest.raises(ValidationError):
        settings.limits.body_bytes = 5


# -- problems ----------------------------------------------------------------------------------------------------------


def test_unknown_key_names_itself_its_file_and_the_nearest(config: Path) -> None:
    config.write_text("slotz = 3\n")
    assert problems(config) == (f'{config}: slotz is not a known key; did you mean "slots"?',)


def test_unknown_key_in_a_table_is_compared_with_that_table(config: Path) -> None:
    config.write_text('[limits]\nbody_byte = 3\n[[trusted]]\naddress = "0x00"\nmultiaddr = []\n')
    assert problems(config) == (
        f'{config}: trusted[0].multiaddr is not a known key; did you mean "multiaddrs"?',
        f'{config}: limits.body_byte is not a known key; did you mean "body_bytes"?',
    )


def test_unknown_key_like_nothing_known_suggests_nothing(config: Path) -> None:
    config.write_text("colour = 3\n")
    assert problems(config) == (f"{config}: colour is not a known key",)


def test_unknown_variable_names_itself_and_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPU_SAMPLE_SLOT", "3")
    assert problems(None) == (
        'environment variable NGPU_SAMPLE_SLOT is not a known key; did you mean "NGPU_SAMPLE_SLOTS"?',
    )


def test_each_problem_names_the_source_of_its_value(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('mode = "shut"\n')
    monkeypatch.setenv("NGPU_SAMPLE_LISTEN", '["x"]')
    found = problems(config, {"slots": 0})
    assert found == (
        "--slots: slots: must be at least 1",
        f"{config}: mode: must be one of open, approved",
        "environment variable NGPU_SAMPLE_LISTEN: listen: a multiaddr starts with a slash",
    )


def test_a_rule_between_keys_is_told_in_its_own_words(config: Path) -> None:
    class Paired(Sample):
        @model_validator(mode="after")
        def _slots_need_an_open_mode(self) -> Self:
            raise ValueError("slots 4 needs mode open: set mode")

    config.write_text('mode = "open"\n')
    with pytest.raises(ConfigurationError) as caught:
        load_settings(Paired, config, PREFIX, {"slots": 4})
    assert caught.value.problems == ("configuration: slots 4 needs mode open: set mode",)


def test_a_missing_required_key_is_named(config: Path) -> None:
    config.write_text("[[trusted]]\nmultiaddrs = []\n")
    assert problems(config) == (f"{config}: trusted[0].address is required",)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("slots = ", id="no value"),
        pytest.param("[", id="cut"),
        pytest.param("slots = 1\nslots = 2", id="twice"),
        pytest.param("\0", id="control character"),
        pytest.param("slots = " + "9" * 5000, id="a number of 5,000 digits"),
        pytest.param("slots = " + "[" * 20_000, id="too deep"),
        pytest.param("slots = 2021-02-30", id="no such day"),
    ],
)
def test_what_is_not_toml_is_one_line(config: Path, text: str) -> None:
    config.write_text(text)
    (problem,) = problems(config)
    assert problem.startswith(f"{config}: not valid TOML: ")


def test_a_file_that_is_not_text_is_one_line(config: Path) -> None:
    config.write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in problems(config)[0]


def test_a_missing_file_is_one_line(config: Path) -> None:
    assert problems(config) == (f"cannot read the configuration {config}: No such file or directory",)


def test_a_list_in_the_environment_that_is_not_json_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPU_SAMPLE_LISTEN", "/ip4/secret-looking")
    (problem,) = problems(None)
    assert "listen" in problem
    assert "JSON" in problem
    assert "secret-looking" not in problem


def test_problems_never_quote_the_value(config: Path) -> None:
    config.write_text('slots = "hunter2"\nmode = "hunter2"\n[limits]\nbody_bytes = "hunter2"\n')
    assert "hunter2" not in " ".join(problems(config))


def test_nearest_ignores_case() -> None:
    assert nearest("DATA_DIR", ["data_dir", "slots"]) == "data_dir"
    assert nearest("zzz", ["data_dir", "slots"]) is None


# -- the sample --------------------------------------------------------------------------------------------------------


def test_the_sample_loads_as_it_stands_and_means_the_defaults(config: Path) -> None:
    config.write_text(sample_toml(Sample, "A heading.\nOf two lines."))
    assert load_settings(Sample, config) == Sample()


def test_the_sample_documents_every_key_and_loads_uncommented(config: Path) -> None:
    lines = sample_toml(Sample).splitlines()
    keys = [line.removeprefix("# ") for line in lines if " = " in line or line.endswith("]")]
    config.write_text("\n".join(keys))
    loaded = load_settings(Sample, config)
    assert loaded == Sample(trusted=(Trusted(address="0x00"),), limits=Limits(note="none"))
    assert set(loaded.model_fields_set) == set(Sample.model_fields)


def test_the_sample_shows_descriptions_line_by_line() -> None:
    text = sample_toml(Sample, "Head.")
    assert text.startswith("# Head.\n\n# Where state is kept.\n")
    assert "# Tasks at once.\n# Each holds a GPU.\n# slots = 4\n" in text


@given(
    st.dictionaries(
        st.sampled_from(["note"]),
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))),
    )
)
def test_any_text_survives_as_toml(values: dict[str, str]) -> None:
    text = "\n".join(f"{key} = {toml_value(value)}" for key, value in values.items())
    assert tomllib.loads(text) == values


@given(
    st.recursive(
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_value_survives_as_toml(value: Any) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}
