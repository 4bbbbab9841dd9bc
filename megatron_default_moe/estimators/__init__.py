"""The estimators of the router gradient: a file each, and the table that names them."""
