"""Several runs on one page of HTML that loads nothing."""
