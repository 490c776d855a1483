"""The nouns (program, machine, schedule), the referee that judges them, and the verb `plan`."""
