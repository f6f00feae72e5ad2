"""Neural models as linen modules; arrays of the data arrive as arguments."""
