"""What the packet filter is told, and what is made of what it says. Pure; the real one: `integration/netns`."""

from __future__ import annotations

from ngpu_node.engine.firewall import Listing, difference, instructions, removal, wanted

BEFORE = Listing.of(
    """\
-P INPUT ACCEPT
-P FORWARD DROP
-N DOCKER-USER
-N NGPU-old-HOST
-A INPUT -i lo -j ACCEPT
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
"""
)
CLOSED = [chain for chain in wanted("12345678", "ngpu12345678", None) if chain.program == "iptables"]
OPEN = [chain for chain in wanted("12345678", "ngpu12345678", "ngpu12345678o") if chain.program == "iptables"]


def after(listing: Listing, text: str) -> Listing:
    """Do as `iptables-restore --noflush` does."""
    chains = {name: list(rules) for name, rules in listing.chains.items()}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        name, _, rule = rest.partition(" ")
        if word.startswith(":"):
            chains[word[1:]] = []
        elif word == "-A":
            chains[name].append(rule)
        elif word == "-I":
            chains[name].insert(0, rule.removeprefix("1 "))
        elif word == "-D":
            chains[name].remove(rule)
        elif word == "-F":
            chains[name].clear()
        elif word == "-X":
            del chains[name]
    return Listing({name: tuple(rules) for name, rules in chains.items()})


def set_(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {chain.name: listing.chains.get(chain.name, ()) for chain in OPEN}


def test_everything_is_said_in_one_transaction_and_asked_before_all_else() -> None:
    text = instructions(OPEN, BEFORE)
    assert text.startswith("*filter\n")
    assert text.count("COMMIT") == 1
    now = after(BEFORE, text)
    assert now.chains["INPUT"][:2] == (
        "-i ngpu12345678o -j NGPU-12345678-HOST",
        "-i ngpu12345678 -j NGPU-12345678-HOST",
    )
    assert now.chains["DOCKER-USER"][0] == "-i ngpu12345678o -j NGPU-12345678-OUT"
    assert now.chains["NGPU-12345678-OUT"][0].endswith("-j RETURN")
    assert difference(OPEN, now, set_(now)) == ""


def test_said_twice_it_is_there_once() -> None:
    once = after(BEFORE, instructions(OPEN, BEFORE))
    assert after(once, instructions(OPEN, once)) == once


def test_a_rule_that_came_before_ours_is_noticed_and_goes_behind_them_again() -> None:
    once = after(BEFORE, instructions(CLOSED, BEFORE))
    pushed = Listing({**once.chains, "INPUT": ("-j ACCEPT", *once.chains["INPUT"])})
    assert "not called first in INPUT" in difference(CLOSED, pushed, set_(once))
    again = after(pushed, instructions(CLOSED, pushed))
    assert again.chains["INPUT"][:2] == ("-i ngpu12345678 -j NGPU-12345678-HOST", "-j ACCEPT")


def test_two_nodes_of_one_machine_let_each_other_be_first() -> None:
    other = [chain for chain in wanted("87654321", "ngpu87654321", None) if chain.program == "iptables"]
    one = after(BEFORE, instructions(CLOSED, BEFORE))
    both = after(one, instructions(other, one))
    assert difference(CLOSED, both, set_(both)) == ""
    assert difference(other, both, {chain.name: both.chains[chain.name] for chain in other}) == ""


def test_a_flush_in_each_of_its_forms_is_noticed() -> None:
    now = after(BEFORE, instructions(OPEN, BEFORE))
    known = set_(now)
    flushed = Listing(dict.fromkeys(now.chains, ()))
    assert "are others" in difference(OPEN, flushed, known)
    assert "is gone" in difference(OPEN, BEFORE, known)
    one_less = {**now.chains, "NGPU-12345678-OUT": now.chains["NGPU-12345678-OUT"][:-1]}
    assert "are others" in difference(OPEN, Listing(one_less), known)
    uncalled = {**now.chains, "DOCKER-USER": ("-j RETURN",)}
    assert "not called first in DOCKER-USER" in difference(OPEN, Listing(uncalled), known)


def test_where_dockers_own_chain_is_gone_forwarding_is_asked_directly() -> None:
    bare = Listing.of("-P INPUT ACCEPT\n-P FORWARD ACCEPT\n")
    now = after(bare, instructions(OPEN, bare))
    assert now.chains["FORWARD"] == ("-i ngpu12345678o -j NGPU-12345678-OUT",)
    # Docker makes its chain again: ours goes there too
    back = Listing({**now.chains, "DOCKER-USER": ("-j RETURN",)})
    assert "DOCKER-USER" in difference(OPEN, back, set_(now))
    both = after(back, instructions(OPEN, back))
    assert both.chains["FORWARD"] == both.chains["DOCKER-USER"][:1] == ("-i ngpu12345678o -j NGPU-12345678-OUT",)


def test_what_docker_puts_before_ours_when_a_network_is_made_is_no_difference_unless_its_users_are_asked_late() -> None:
    now = after(BEFORE, instructions(OPEN, BEFORE))
    forward = ("-j DOCKER-USER", "-j DOCKER-ISOLATION-STAGE-1", "-i br-1 ! -o br-1 -j ACCEPT", *now.chains["FORWARD"])
    assert difference(OPEN, Listing({**now.chains, "FORWARD": forward}), set_(now)) == ""
    late = Listing({**now.chains, "FORWARD": ("-i br-1 ! -o br-1 -j ACCEPT", *forward)})
    assert "not called first in FORWARD" in difference(OPEN, late, set_(now))
    theirs = ("-s 192.0.2.0/24 -j ACCEPT", *now.chains["DOCKER-USER"])
    assert "not called first in" in difference(OPEN, Listing({**now.chains, "DOCKER-USER": theirs}), set_(now))


def test_removal_leaves_what_was_there_before() -> None:
    now = after(BEFORE, instructions(OPEN, BEFORE))
    assert after(now, removal(OPEN, now)) == BEFORE
    assert removal(OPEN, BEFORE) == ""
