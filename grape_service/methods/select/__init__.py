"""Select methods, one a module: a function of each candidate's token statistics to one number."""
