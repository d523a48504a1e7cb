"""One row: what it says, how it is written as tokens, and what of it is learned."""
