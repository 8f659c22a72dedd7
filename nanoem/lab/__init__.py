"""What a run needs around the paper: its folder, its settings, processes, tables and figures.

Begin with toy.py, a run on the toy world, and folder.py, what it leaves on disk.
"""
