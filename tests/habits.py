"""The habits of handwriting that training and the drawn test set both have to know."""

ASKED_FOR = ("1, long flag", "1, foot", "7, cross bar", "9, curled tail", "4, small loop", "4, open")
