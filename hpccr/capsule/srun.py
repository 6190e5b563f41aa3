"""Started by the script `bin/srun` as `python -I -S srun.py [OPTION...] PROGRAM...`: see step/srun.py.

Only an entry: a main script is compiled at every start, what it imports is not.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/hpccr/capsule/", 1)[0])
    from hpccr.capsule.step.srun import main

    main(sys.argv[1:])
