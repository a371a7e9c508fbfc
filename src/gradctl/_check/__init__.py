"""`gradctl.check`: is a derivative the derivative of what was computed, and if not, how is it wrong."""
