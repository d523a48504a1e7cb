"""What answers are worth: pure functions of answers and the right ones, their intervals, and the tests between two runs."""
