"""Started as `python -I -S label.py STREAMS LABEL COMMAND...`: puts LABEL in front of the lines that COMMAND prints.

For the tasks of `srun --label` whose output does not pass srun: those that mpirun starts, or that have a file each.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/hpccr/capsule/", 1)[0])
    from hpccr.capsule.step.labels import main

    main(sys.argv[1:])
