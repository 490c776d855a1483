"""The verb: `plan(model, budget)`."""
