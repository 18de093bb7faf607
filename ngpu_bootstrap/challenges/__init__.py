"""GPU challenges, from the bootstrap's side: whom to challenge when, how it goes, and what follows from it.

What a challenge is and why it proves anything is told in `ngpu_protocol/challenge`; who cheats how is in
`docs/trust.md`.

    policy.py        whom next, when, and what a finding does to a node's standing: pure
    conversation.py  one challenge of one GPU, from the puzzle to the openings: whatever carries its requests
    checking.py      the check of the openings, in a process of its own with bounds
    judge_child.py   that process
    desk.py          rounds: nodes made ready, held, challenged at one moment, recorded
    errands.py       its requests as tasks of one node, with order and receipt
"""
