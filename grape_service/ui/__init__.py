"""`grape ui`: a read-only web application of all datasets in a folder. It reads, and writes nothing."""
