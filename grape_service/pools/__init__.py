"""What a team brings: files of candidates in several formats, read row by row and normalised."""
