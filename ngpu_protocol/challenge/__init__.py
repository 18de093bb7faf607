"""A challenge that shows a GPU to be what its node claims, checked without one.

The bootstrap sends a `Puzzle` sized to the claim. The node (any program: `examples/challenge` is one) must

1. multiply two matrices that follow from the seed; the product C fills most of the memory;
2. commit to C: a digest of every 32x32 tile, the digests hashed into a Merkle tree; answer with the root, in time;
3. when asked to go on, follow chains through C, each step of which reads the entry that the last one names, as a salt
   leads them that comes with the question; answer with the root of a tree over their ends, in a time of its own;
4. open the tiles and chains that the bootstrap then names.

What catches whom. *A slower card* takes too long over the product, which costs rows x columns x depth whatever one
does, since digests are no linear functions of C. *Less memory* takes too long over the chains: an entry that is not in
memory costs a scalar product of length depth, a thousand times the bytes. *Two claims on one card*, asked at once,
take twice as long or do not fit. *A replayed answer* is for another seed. *A relayed challenge* must come back within
the same times; how far that reaches is their business (`speeds`). *A wrong product* fails Freivalds' check: for a
secret random vector r, (A B) r is compared with A (B r) modulo 2^16. A row that is off by anything odd survives with a
chance of one in 2^16, and a made-up tile has 32 of them.

Why modulo 2^16. An entry of C is a sum of many small numbers: 13 or 14 bits of information, however wide it is kept.
Kept as 16 bits, what fills the memory cannot be kept in much less.

Why a salt. Until it comes nobody knows where chains lead. Could they be followed, or a table of their steps be made (16
GiB, for states of 32 bits), while the product is made part by part, it would never have to be in memory as a whole.

All numbers are exact: entries of the factors are -8 to 7, so that sums stay below 2^24, where 32-bit floating point,
TF32 included, has no rounding whatever the order of summation.

    puzzle.py          the puzzle, and the sizing of one
    numbers.py         the numbers that follow from a seed
    commitment.py      tiles, blocks, the Merkle tree
    verification.py    what a bootstrap checks
    speeds.py          how long a model may take
"""
