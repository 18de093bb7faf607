"""Workspaces that the configuration names for profiles: there, mistyped, or removed since."""

from __future__ import annotations

from ngpu_bootstrap.config import ProfilesSection
from ngpu_bootstrap.profiles.bindings import check_bindings

NAMES = {"367614711220405248": "paint", "907702481605937725": "chat"}


def problems(bind: str, names: dict[str, str] = NAMES, removed: tuple[str, ...] = ()) -> tuple[str, ...]:
    section = ProfilesSection.model_validate({"bind": {"akashgen": bind}})
    return check_bindings(section, names, removed).problems


def test_workspaces_that_are_there_are_no_problem() -> None:
    assert problems("367614711220405248") == ()


def test_a_mistyped_id_is_told_the_one_that_was_meant() -> None:
    (line,) = problems("367614711220405284")
    assert line.startswith('profiles.bind.akashgen: there is no workspace "367614711220405284"; ')
    assert line.endswith('did you mean "367614711220405248" (paint)?')


def test_a_name_in_the_place_of_an_id_is_told_the_id() -> None:
    assert problems("chat")[0].endswith('did you mean "907702481605937725" (chat)?')


def test_an_id_like_none_leads_to_the_list_and_the_first_of_all_to_making_one() -> None:
    assert problems("111111111111111111")[0].endswith("`ngpu-bootstrap workspace list` lists those there are")
    assert "`ngpu-bootstrap workspace add --file FILE`" in problems("1", {})[0]


def test_a_workspace_that_was_removed_since_is_no_problem_but_lost() -> None:
    section = ProfilesSection.model_validate(
        {"bind": {"akashgen": "5"}, "public": {"akashgen": {"workspace": "5"}, "openai": {"workspace": "6"}}}
    )
    found = check_bindings(section, NAMES, {"5"})
    assert found.lost == (("profiles.bind.akashgen", "5"), ("profiles.public.akashgen.workspace", "5"))
    assert [line.partition(":")[0] for line in found.problems] == ["profiles.public.openai.workspace"]
