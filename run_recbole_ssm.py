"""Train and test a model: ``python run_recbole_ssm.py --model=Hydra4Rec --dataset=ml-100k``; ``--help`` says more."""

import sys

from recbole_ssm.cli import main

if __name__ == "__main__":
    sys.exit(main())
