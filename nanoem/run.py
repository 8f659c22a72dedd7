"""The command line: python -m nanoem.run, and python -m nanoem.run --model FOLDER

Runs the experiment in a run folder, on the toy world or on real weights, prints a table, writes
report.md and figures. What is finished is reused when the command is given again.
"""

import signal
import sys

if __name__ == "__main__":  # torch takes seconds to import: Ctrl-C ends them silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from nanoem import UserError
from nanoem.lab import parallel, report
from nanoem.lab.command import SMALLER, parse_flags, read_command
from nanoem.lab.files import write_json
from nanoem.lab.folder import lock, lock_many
from nanoem.lab.shell import exit_status
from nanoem.lab.side_by_side import run_side_by_side, toy_threads
from nanoem.real import report as real_report
from nanoem.real.experiment import run_real
from nanoem.story import run_experiment


def run(command):
    """Carry out a Command, in each of the processes if torchrun started several."""
    with parallel.started(command.device) as device:
        if command.has_seeds and parallel.rank() == 0:
            lock_many(command.out)

        # each seed, and its report when it is done
        results = []
        for result, folder in zip(results_of_seeds(command, device), command.folders):
            results.append(result)
            if parallel.rank() == 0:
                lock(folder)  # with --jobs the child that held it has ended
                if command.tells_the_story:
                    report_on([result], folder, command)

        if parallel.rank() == 0:
            conclude(command, results)


def results_of_seeds(command, device):
    """What every seed's results.json holds, each as soon as it is there."""
    if command.jobs > 1:
        print(f"{len(command.configs)} seeds on {device}, {command.jobs} at a time -> "
              f"{command.out}")
        yield from run_side_by_side(command.configs, command.folders, device, command.stages,
                                    command.rows, command.jobs)
        return
    for config, folder in zip(command.configs, command.folders):
        n_threads = torch.get_num_threads() if command.files else toy_threads()
        print(f"seed {config.seed} on {device}, {n_threads} thread{'s' * (n_threads > 1)} -> "
              f"{folder}")
        if command.files:
            yield run_real(config, command.files, folder, device, command.shard)
        else:
            yield run_experiment(config, folder, device, command.stages, command.rows)


def conclude(command, results):
    """Write what all seeds show together, print the table, and say where to look."""
    out = command.out
    if not command.tells_the_story:
        print(f"\nfinished in {out}: {', '.join(command.stages)}; without --only the same command "
              "goes on and writes the report")
        return
    if command.has_seeds:
        write_json(out / "results.json", {"seeds": results})
        report_on(results, out, command)
    report_of(command).print_table(results)
    if command.quick:
        print("--quick is too short to learn much: its numbers show that all works, nothing else")
    print(f"\nlook at {out / 'report.md'} and {out / 'figures'}")


def report_of(command):
    """The module that reports: of real weights or of the toy."""
    return real_report if command.files else report


def report_on(results, folder, command):
    """Write a report; say so when results.json is of an older nanoem, or was edited."""
    try:
        report_of(command).write_report(results, folder, command.text)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'results.json'} is not as this nanoem writes it ({error!r}); "
                        "delete that folder, and the same command makes it again") from error


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    is_real = bool(parse_flags(argv).model)
    return exit_status(lambda: run(read_command(argv)),
                       "; the same command goes on with the next unfinished stage",
                       f"; try, with another --out, --set {SMALLER[is_real]}")


if __name__ == "__main__":
    sys.exit(main())
