"""An HTTP server that makes pictures with a student, and takes up the next one when its alias moves.

api.py       a request and its answers, in the shape that OpenAI's clients send and read
student.py   a student ready to draw, and who takes its place
batches.py   pictures that wait, and are drawn together
metrics.py   what Prometheus reads
app.py       the routes, the page among them (templates/serve.html)
server.py    all of it together, until SIGTERM
"""
