"""Seeded synthetic tasks with exact checkers; each module says what solving it proves.

- `expressions`: arithmetic expressions of several operands, solved step by step.
- `stories`: micro-stories with an exact parser, a known probability and known latents for every token.
- `word_problems`: word problems and sums in the words of the stories, with operand pairs held out for good.
- `chat`: capitals and JSON sums, for instruction models that get them right in part.

All need the standard library only.
"""
