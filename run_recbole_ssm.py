"""Train and test a model: ``python run_recbole_ssm.py --model=Hydra4Rec --dataset=ml-100k``; ``--help`` says more."""

import sys

from recbole_ssm.cli import main

if __name__ == "__main__":
    # Without arguments recbole-ssm prints its help, and this trains the default model.
    sys.argv[1:] = sys.argv[1:] or ["train"]
    sys.exit(main())
