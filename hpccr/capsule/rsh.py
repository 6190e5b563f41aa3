"""Started by the script `hpccr-rsh` as `python -I -S rsh.py [OPTION...] HOST COMMAND...`: see client.py.

Only an entry: a main script is compiled at every start, what it imports is not.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/hpccr/capsule/", 1)[0])
    from hpccr.capsule.client import main

    main(sys.argv[1:])
