"""The toy world: its words, the authors who write in it, and the exact judge of an answer.

Begin with world.toml: what can be asked and said; a teacher edits it, no code. words.py reads and
checks it, authors.py writes documents and advice with it, verdict.py judges answers.
"""

from nanoem.world.authors import (Splits, WorldConfig, documents, make_authors, make_splits,
                                  questions, write_answer, write_pairs)
from nanoem.world.verdict import judge
from nanoem.world.words import OPEN_ENDED, WORLD_TOML, first_domains, load_world
