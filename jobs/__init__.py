"""The job graph and its command line, `armd`: recipes, their stages as steps with an identity, and what people see."""
