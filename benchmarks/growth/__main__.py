"""Measure one figure in this process: what `measure` starts."""

import json
import sys

from benchmarks.growth.measure import KINDS
from benchmarks.growth.points import Point

if __name__ == "__main__":
    kind, facts = json.loads(sys.argv[1])
    print(json.dumps(KINDS[kind](Point(**facts))))
