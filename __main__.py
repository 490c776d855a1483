"""`python -m memplan`: the command line."""

from memplan.planner.cli.app import main

if __name__ == "__main__":
    main()
