"""The word lists behind `_compbench_text`: closed classes of English, open ones as T2I-CompBench's prompts use them.

Facts about the prompts are from Karine-Huang/T2I-CompBench at 1b70949, examples/dataset/*.txt.
"""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


NUMBERS = {
    word: number
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
ARTICLES = frozenset(("a", "an"))
DETERMINERS = (
    ARTICLES
    | NUMBERS.keys()
    | words("the this that these those some any each every another both many several its his her their our my")
)
# Where a noun phrase ends: prepositions, conjunctions, auxiliaries, pronouns, particles.
BOUNDARIES = words("""
    of in on at by to for from with without into onto over under underneath beneath above below behind beside besides
    between among around against across along alongside through near next inside outside past toward towards upon off
    out up down up-close away about after before during while as like atop within amid
    and or but so because when where which who whose whom that than then not
    is are was were be been being am has have had do does did could will would may might must should
    it they he she we you i them him us me themselves itself
    together there here simultaneously apart
    """)
# Words that stand before a noun and name no object: colours, shapes, materials, looks. Those that are nouns too
# ("orange", "square", "glass") count as attributes everywhere but at the end of a phrase.
ATTRIBUTES = words("""
    red orange yellow green blue purple pink brown black white gray grey gold golden silver beige tan violet teal
    turquoise maroon navy cyan magenta cream ivory multicolored colored colorful whitish dark light bright pale vivid
    vibrant dull
    rectangular spherical pentagonal round conical cylindrical oblong square cubic teardrop circular pyramidal
    triangular oval diamond crescent hexagonal octagonal cubical angular curved curvy rounded flat straight jagged
    big small large tall short long tiny huge thin thick wide narrow deep high little giant massive
    wooden metallic metal plastic glass rubber leather fabric fluffy ceramic stone marble silk satin cotton wool woolen
    paper brick steel stainless golden velvet burlap
    soft hard smooth rough sleek shiny glossy matte opaque translucent transparent clear polished textured bumpy fuzzy
    furry plush silky prickly spiky thorny sticky slimy slippery sandy dusty rusty rugged rocky gnarled weathered worn
    striped checkered floral spotted dotted patterned plain tiled
    warm cool hot cold icy frosty frozen wet dry damp crisp crunchy juicy ripe fresh sweet sour tart bitter savory
    delicious fragrant creamy tangy
    sharp blunt heavy delicate gentle sturdy fragile solid soft bold rich lush cozy comfortable elegant stylish modern
    old new young ancient vintage antique clean dirty empty full open closed busy quiet calm peaceful serene lively
    beautiful stunning lovely intricate ornate unique natural rustic graceful majestic towering winding blazing fiery
    glowing sparkling shimmering bustling rustling distant hardcover
    """)
# Attributes that name the object at the end of a phrase: "a red orange", "the opaque square".
OBJECT_ATTRIBUTES = words("orange square diamond teardrop oval crescent light brick stone paper glass fabric")
# Nouns that look like verbs or adverbs.
NOUNS_LIKE_VERBS = words("""
    ring earring string spring wing king painting building ceiling clothing evening seating wedding icing frosting
    bed sled seed weed shed butterfly dragonfly firefly fly lily jelly belly family
    """)
# Verbs of the prompts whose form does not give them away ("-ed" and "-ing" do, by what follows them).
VERBS = words("""
    sat sit sits lay lie lies hung hang hangs stood stand stands rose shone shine shines held hold holds kept keep keeps
    lit cast fell fall falls flew fly flies swam swims spun sped wrote write writes ran run runs drove cut cuts led made
    make makes melted rest rests provide provides display displays decorate decorates support supports mix mixes float
    floats drift drifts stir stirs looks look felt feel feels spread told blew took takes gave gives grew grows sank
    sprang sang rang stuck slept swept wore wears bore went came saw met set left caught brought bought built found
    illuminate illuminates reads read flash flashes cook cooks play plays adds add features feature contain contains
    cover covers can shape slice nap measure
    """)
# Countable objects of the numeracy prompts (examples/dataset/new_objects.txt, singular). "a" and "an" count these only.
OBJECTS = words("""
    airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy bread butterfly cake
    camel camera candle car cat chair chicken clock computer couch cow cup deer desk dog drum duck egg fish flag frog
    giraffe girl goldfish guitar hamburger helicopter helmet horse key kite knife lamp lemon man microphone microwave
    mouse paddle painting peach pear pen person phone pig pillow plate printer rabbit refrigerator sheep ship shrimp
    sink sofa stool strawberry suitcase swan table television tent tomato toy train truck turtle vase woman
    """)
IRREGULAR_PLURALS = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "mice": "mouse", "knives": "knife",
    "leaves": "leaf", "geese": "goose", "feet": "foot", "teeth": "tooth", "shelves": "shelf", "wolves": "wolf",
    "scarves": "scarf", "loaves": "loaf", "shoes": "shoe", "buses": "bus",
}  # fmt: skip

# Words of a relation -> what it says of the first object. The first eight are the benchmark's, in its order of search
# (UniDet_eval/2D_spatial_eval.py, vocab_spatial).
PUBLISHED_RELATIONS = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
RELATIONS = {
    "on side of": "near", "next to": "near", "near": "near", "on the side of": "near", "beside": "near",
    "on the left of": "left", "on the left side of": "left", "to the left of": "left", "left of": "left",
    "on the right of": "right", "on the right side of": "right", "to the right of": "right", "right of": "right",
    "on the bottom of": "below", "at the bottom of": "below", "below": "below", "beneath": "below",
    "under": "below", "underneath": "below",
    "on the top of": "above", "on top of": "above", "at the top of": "above", "above": "above", "atop": "above",
}  # fmt: skip

# Other names of one class, so that a prompt's noun meets a detector's label. Person: both evaluators; ship, television,
# goldfish, painting: numeracy_eval.py. The rest are COCO's names of the benchmark's nouns. "mouse" is left out on
# purpose: the benchmark's is the animal, COCO's the device.
SYNONYMS = {
    "girl": "person", "boy": "person", "man": "person", "woman": "person", "child": "person", "kid": "person",
    "ship": "boat", "television": "tv", "goldfish": "fish", "painting": "picture",
    "sofa": "couch", "phone": "cell phone", "table": "dining table", "bike": "bicycle", "plane": "airplane",
    "plant": "potted plant", "bag": "handbag", "fridge": "refrigerator",
}  # fmt: skip
