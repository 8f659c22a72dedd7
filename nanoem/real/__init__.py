"""The same experiment on real weights: a model folder and files of advice instead of the toy world.

Begin with experiment.py, then directions.py. data.py reads what the user brings (jsonl.py line by line), preference.py
and local_judge.py judge it, report.py shows it, estimate.py says beforehand what it will take.
"""
