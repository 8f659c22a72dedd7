"""The paper on the toy: eighteen rows, each a prediction, a measurement, a check and a figure.

row.py        what a row is
solutions.py  SFT is general, KL makes it narrow, how firmly: R1-R4, R14
geometry.py   why general is easy: R5, R6, R8, R15
trajectory.py where training goes: R7, R9
mediation.py  the one direction: R10-R12
worlds.py     other pre-training: R16, R18
traits.py     other traits than bad advice: R13, R17
"""

from nanoem.rows import geometry, mediation, solutions, traits, trajectory, worlds

EVERY = (solutions.ROWS + geometry.ROWS + trajectory.ROWS + mediation.ROWS + worlds.ROWS
         + traits.ROWS)
ROWS = {row.key: row for row in sorted(EVERY, key=lambda row: int(row.key[1:]))}
