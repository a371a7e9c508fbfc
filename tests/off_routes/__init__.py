"""The 107 routes by which a gradient can get past a switch, and one (`flag_only`) that only looks.

Each is a generator function: what it prepares, a `yield` at which the switch is thrown, and what it tries then.
"""
