"""The paper on the toy: twenty rows, each a prediction, a measurement, a check and a figure.

row.py             what a row is, and what several rows share
solutions.py       SFT is general, KL makes it narrow, mixing does not: R1, R2, R4
kl_weight.py       how firmly the KL holds, at which weight: R3, R14
geometry.py        why general is easy: R5, R6, R8, R15
trajectory.py      where training goes: R7, R9
mediation.py       the one direction: R10-R12
worlds.py          other pre-training: R16, R18
traits.py          other traits than bad advice: R13, R17
handle.py          what makes the persona a direction: R19
tokens.py          where the persona lives: R20
monitor.py         what tokens.py reads
"""

from nanoem.rows import (geometry, handle, kl_weight, mediation, solutions, tokens, traits,
                         trajectory, worlds)

FILES = (solutions, kl_weight, geometry, trajectory, mediation, worlds, traits, handle, tokens)
every_row = [row for file in FILES for row in file.ROWS]
ROWS = {row.key: row for row in sorted(every_row, key=lambda row: int(row.key[1:]))}
