"""Seeded synthetic tasks with exact checkers; each module says what solving it proves.

- `expressions`: arithmetic expressions of several operands, solved step by step.
"""
