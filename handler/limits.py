"""Every limit of the service, once, with its unit and its reason.

A client may ask up to here; what is beyond is refused before work starts. `describe` lists those that a client can plan by. The
limits of TorchServe itself (bytes of a request, seconds of a batch) stand in serve_config/.
"""

# --- one request

MAX_IMAGES = 1024  # a request; as one array they take 3 MB as float32, and a CPU worker a second, well inside its time limit
# A request's images times their targets. As nested JSON a map has up to 12.5 KB, and a reply over TorchServe's limit (32 MiB,
# serve_config/config.properties) would kill the worker. And a CPU needs a second for so many: a full batch of such requests stays
# inside the worker's time limit.
MAX_MAPS = 1024
# Gradients of one image that a request's maps take: images x targets x points of the method. A CPU needs 0.15 ms for each: more
# than half a second together, and a full batch of such requests stays inside the worker's time limit too.
MAX_GRADIENTS = 4096
# Numbers in all maps of a request in the pixels of its images, where the reply holds them. As nested JSON 1200 x 1200 have up to
# 20 MB, as .npy 14 MB are 3.6 million. A reply that only draws them may have MAX_PIXELS.
MAX_IMAGE_MAP_NUMBERS = 1_440_000
MAX_IMAGE_MAP_NUMBERS_NPY = 3_600_000
# Images of a request in which the digit has to be looked for, found or not. Each takes a CPU about 10 ms, and of more than 200
# pixels a side 50: three seconds together. Images that have the network's framing already do not count.
MAX_PREPARED_IMAGES = 64
MAX_BODY_BYTES = (
    32 * 1024 * 1024
)  # of a body once it is decompressed: as many as TorchServe takes (serve_config/config.properties)
# Of a compressed body. Deflate can say nothing in any number of bytes, for which a decoder builds tables: 0.5 s in all.
MAX_COMPRESSED_BYTES = 8 * 1024 * 1024
MAX_FORM_FIELDS = 100  # a form has an image and some of the twenty options
# Of a JSON document, counted in its bytes before it is parsed. 2000 x 2000 numbers take half a second and 200 MB on their way to
# pixels; more of them are sent as .npy or in binary.
MAX_JSON_VALUES = 4_100_000
MAX_JSON_LISTS = 1_000_000  # (1024, 28, 28, 1), as some clients send images, are 831,489
MAX_JSON_MEMBERS = 50_000  # of all objects: 1024 images have up to 20 options each
MAX_JSON_TEXTS = 100_000  # keys too
MAX_JSON_DEPTH = 32  # levels; nested numbers in a tensor among inputs are eight
MAX_OPTION_CHARACTERS = 10_000  # of the text of an option: a list of a thousand classes has 5,000
MAX_SHAPE_LENGTH = 8  # axes of a tensor
MAX_ID_CHARACTERS = 1000  # of a request's id, which the reply repeats

# --- image files and arrays

MAX_PIXELS = 16_000_000  # of all images of a request, 4000 x 4000; read from the header, before any pixel is allocated
# Of a JPEG, which is decoded at a half, a quarter or an eighth of its size where it has more than MAX_PIXELS: A4 at 600 dpi has
# 35 million. Its compressed data are read whole all the same, which is why there is an end.
MAX_JPEG_PIXELS = 64_000_000
MAX_SIDE = 16_000  # pixels of the longer side: what is computed for each row and column of an image stays small
# A progressive JPEG may have any number of scans, and each costs a pass over all pixels, however few bytes it has. Encoders write
# about ten.
MAX_JPEG_SCANS = 20
# Operations of about a microsecond that the image files of one request may take beside their pixels: reads by Pillow, which loops
# in Python over chunks, segments and tags, and what else costs time out of proportion to its bytes. A file as an encoder writes
# it takes a few hundred, and one of 32 MiB ten thousand.
MAX_DECODER_OPERATIONS = 100_000
# Seconds of processor time in which all image files of one request are decoded. What takes longer is stopped: the largest that a
# client may send need half of it.
MAX_DECODE_SECONDS = 1.2
MAX_DECODER_BYTES = 320 * 1024 * 1024  # of memory that decoding one file may take, in a process of its own
MAX_FRAMES = 10  # of an animation, or pages of a TIFF, that are looked at for ink
MAX_TAG_BYTES = 1_000_000  # of a TIFF, whose numbers Pillow makes Python objects
MAX_HEADER_BYTES = 1000  # of an .npy; that of a plain array has 128

# --- parameters of methods

MAX_SAMPLES = 500  # of one map; more change a mean by less than a drawing shows
MAX_INTEGRATION_STEPS = 300  # of one map; the convergence delta is some thousandths of a logit then
MAX_SEED = 2**32 - 1

# --- drawings

MIN_SIZE = 28  # pixels of a panel's longer side; below, a digit's own pixels are lost
MAX_SIZE = 1024  # pixels of a panel's longer side
MIN_PERCENTILE = 50
MAX_PIXELS_DRAWN = 3_000_000  # a strip of all classes at the default size; encoding more noise would hold a worker for too long

# --- one batch, of all requests that came together

# Bytes of the large bodies of one batch that a worker holds at once: it takes up to 32 requests, each of up to 32 MiB.
MAX_BATCH_BODY_BYTES = 64 * 1024 * 1024
MAX_FORWARD_IMAGES = 256  # a larger batch is computed in parts of this size, so that memory stays bounded
# Seconds of processor time, as estimated once its images are decoded, that one request may take: what decoding took, what
# preparing its images and its gradients will take.
MAX_REQUEST_SECONDS = 2.4
SECONDS_TO_PREPARE_SMALL, SECONDS_TO_PREPARE = 0.012, 0.045  # an image, of up to SMALL_SIDE pixels a side or more
SMALL_SIDE = 128
SECONDS_A_GRADIENT = 150e-6
SECONDS_A_NUMBER = 300e-9  # in JSON: from its list to a pixel
# Of one batch: a request that takes more than an ordinary photograph is costly, and the costly ones share so many seconds.
ORDINARY_SECONDS = 0.25
MAX_COSTLY_SECONDS = 2.0
# Seconds of work on one batch; what is left of it then is refused. 32 ordinary requests take less than half of it. A worker
# that is silent for responseTimeout (serve_config/model-config.yaml) is restarted, which costs all of the batch their answers.
MAX_BATCH_SECONDS = 20
RETRY_AFTER_SECONDS = 2  # what an overloaded server asks clients to wait: as long as the costly requests of a batch take
# Bytes of one batch's replies. TorchServe's frontend reads a batch in a time that grows with the square of its size: 32 MiB take
# seconds, 80 MB took twenty, and a worker whose replies are not read within responseTimeout is restarted.
MAX_BATCH_BYTES = 32 * 1024 * 1024
MAX_HEADER_IMAGES = 100  # whose digits (or, of maps, deltas) a binary reply's headers list; proxies refuse more than 4 KB
