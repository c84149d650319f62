"""What stage prepare is made of: where images come from, which are taken or refused, and how they are stored."""
