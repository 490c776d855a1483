"""Small frozen rewrites: `Program -> Program` or `Schedule -> Schedule`."""
