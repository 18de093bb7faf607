"""What registries and engines say, as causes a program can tell apart and a person can act on."""

from __future__ import annotations

import pytest

from ngpu_node.images import problems
from ngpu_node.images.problems import (
    BadCredentials,
    BadImage,
    CorruptLayer,
    ImageMissing,
    ImageProblem,
    OutOfSpace,
    PullBroke,
    RateLimited,
    RegistryDown,
    Stalled,
    WrongPlatform,
    from_engine,
    from_registry,
    in_units,
)
from ngpu_node.images.registry import RegistryUnreachable
from ngpu_node.images.retrying import MAX_TRIES, wait_before_retry


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("manifest for 127.0.0.1:5000/a:2 not found: manifest unknown: manifest unknown", ImageMissing),
        ('Get "https://r/v2/": no basic auth credentials', BadCredentials),
        ("unauthorized: authentication required", BadCredentials),
        ("pull access denied for a, repository does not exist or may require 'docker login'", BadCredentials),
        ('Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused', RegistryDown),
        ("dial tcp: lookup r.example: no such host", RegistryDown),
        ("received unexpected HTTP status: 500 Internal Server Error", RegistryDown),
        ("x509: certificate signed by unknown authority", RegistryDown),
        ("unexpected EOF", RegistryDown),
        ("toomanyrequests: You have reached your pull rate limit.", RateLimited),
        ("filesystem layer verification failed for digest sha256:ab", CorruptLayer),
        ("failed to register layer: Error processing tar file(exit status 1): unexpected EOF", CorruptLayer),
        (
            "failed to register layer: Error processing tar file(exit status 1): write /x: no space left on device",
            OutOfSpace,
        ),
        ("write /var/lib/docker/tmp/GetImageBlob1: no space left on device", OutOfSpace),
        ("no matching manifest for linux/amd64 in the manifest list entries", WrongPlatform),
        ("something nobody has seen before", PullBroke),
    ],
)
def test_the_engines_words_tell_the_cause(words: str, problem: type[ImageProblem]) -> None:
    found = from_engine(words, "app:1", logged_in=False)
    assert type(found) is problem
    assert "app:1" in str(found)
    assert words[:60] in str(found)


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (404, ImageMissing),
        (401, BadCredentials),
        (403, BadCredentials),
        (408, RegistryDown),
        (429, RateLimited),
        (400, BadImage),
        (500, RegistryDown),
        (503, RegistryDown),
    ],
)
def test_a_registrys_status_tells_the_cause(status: int, problem: type[ImageProblem]) -> None:
    found = from_registry(status, "UNKNOWN: words\nof\tthe registry", "app:1", logged_in=True)
    assert type(found) is problem
    assert "words of the registry" in str(found)


def test_long_words_are_shown_in_part() -> None:
    assert len(str(from_registry(500, "x" * 10_000, "app:1", logged_in=False))) < 400
    assert len(str(from_engine("x" * 10_000, "app:1", logged_in=False))) < 400


def test_whoever_gave_credentials_is_told_they_are_wrong_and_others_to_give_some() -> None:
    assert "credentials given" in str(from_registry(401, "", "a", logged_in=True))
    assert "give registry credentials" in str(from_registry(401, "", "a", logged_in=False))


def test_every_cause_has_a_word_of_its_own() -> None:
    def below(kind: type[ImageProblem]) -> list[type[ImageProblem]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    words: dict[str, list[type[ImageProblem]]] = {}
    for kind in below(ImageProblem):
        words.setdefault(kind.reason, []).append(kind)
    shared = {word: kinds for word, kinds in words.items() if len(kinds) > 1}
    assert {word: {kind.__name__ for kind in kinds} for word, kinds in shared.items()} == {
        "disk_full": {"DiskFull", "OutOfSpace"},
        "registry_unavailable": {"RegistryDown", RegistryUnreachable.__name__},
    }


def test_what_cannot_pass_is_never_tried_again_and_what_can_only_so_often() -> None:
    assert wait_before_retry(ImageMissing("x"), 1, 3600) is None
    assert wait_before_retry(BadCredentials("x"), 1, 3600) is None
    waits = [wait_before_retry(RegistryDown("x"), tries, 3600) for tries in range(1, MAX_TRIES + 1)]
    assert waits[-1] is None
    known = [wait for wait in waits if wait is not None]
    assert known == sorted(known)
    assert wait_before_retry(CorruptLayer("x"), 1, 3600) is not None
    assert wait_before_retry(CorruptLayer("x"), 2, 3600) is None
    assert wait_before_retry(Stalled("x"), 3, 3600) is None
    assert wait_before_retry(OutOfSpace("x"), 1, 3600) is None


def test_a_registry_that_names_a_time_is_left_alone_so_long_if_there_is_as_much() -> None:
    limited = from_registry(429, "", "a", logged_in=False, after_s=40)
    assert wait_before_retry(limited, 1, 100) == 40
    assert wait_before_retry(limited, 1, 30) is None
    assert limited.again_s == problems.AGAIN_S
    forever = from_registry(429, "", "a", logged_in=False, after_s=1e6)
    assert forever.after_s == problems.MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_540_000, "1.54 MB"), (999_600, "1 MB"), (99_500_000, "100 MB"),
     (12_345_678_901, "12.3 GB"), (4 * 10**12, "4 TB"), (5 * 10**15, "5000 TB")],
)  # fmt: skip
def test_bytes_are_shown_as_people_read_them(count: int, text: str) -> None:
    assert in_units(count) == text
