"""LASER: matrices replaced by approximations of lower rank."""
