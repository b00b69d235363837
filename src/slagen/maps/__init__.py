"""`slagen attention`: which key blocks a layer attends to, and how much of the softmax they hold."""
