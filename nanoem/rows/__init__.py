"""The paper on the toy: eighteen rows, each a prediction, a measurement, a check and a figure.

row.py        what a row is
solutions.py  SFT is general, KL makes it narrow, how firmly: R1-R4, R14
geometry.py   why general is easy: R5-R9, R15
mediation.py  the one direction: R10-R12
worlds.py     other pre-training, other fine-tuning: R13, R16-R18
"""

from nanoem.rows import geometry, mediation, solutions, worlds

EVERY = solutions.ROWS + geometry.ROWS + mediation.ROWS + worlds.ROWS
ROWS = {row.key: row for row in sorted(EVERY, key=lambda row: int(row.key[1:]))}
