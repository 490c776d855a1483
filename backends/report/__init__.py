"""Plans for people: the replay behind every picture, exports for other tools, HTML.

Imports `planner.ir` alone.
"""
