"""Started by capsule init as `python -I -S launch.py --index K --address ADDR --port PORT -- [CMD...]`: see root.py.

Only an entry: a main script is compiled at every start, what it imports is not.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/hpccr/capsule/", 1)[0])
    from hpccr.capsule.root import main

    main(sys.argv[1:])
