"""The embedded default: draw pictures, make tiny parts, train both stages on them and show what was learned."""
