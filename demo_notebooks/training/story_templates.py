"""The templates of the story grammar; :mod:`stories` explains their notation.

No template here names two people and then has one of them act on the other by name at
the end of a clause: that pattern belongs to :mod:`ioi`, where names are held out.
"""

from __future__ import annotations

MEETINGS: tuple[str, ...] = (
    "[One {weather} {time}|One {time}|Last {day}|On {day}], {A} [went|walked|ran] to the {place}",
    "{A} was a {A_trait} {A_kid}. [One day|One {time}], {A_he} [went|walked] to the {place}",
    "There was once a {A_kid} [named|called] {A}. {A_He} lived near a {place2}. "
    "[One day|One {weather} {time}], {A_he} went to the {place}",
    "It was a {weather} {time}[| in {season}]. {A} [went|walked] to the {place}",
    "{A} liked the {place} very much. [One day|On {day}], {A_he} went there",
    "Once upon a time, there was a {A_kid} [named|called] {A}. {A_He} was {A_trait}. One day, "
    "{A_he} went to the {place}",
)
PURPOSES: tuple[str, ...] = (
    ".",
    ".",
    " to [look for|buy|find] {a_thing2}.",
    " with {A_his} [mother|father|dog|sister|brother].",
    " because {A_he} [wanted|needed] {a_thing2}.",
    " to meet {A_his} friends.",
)
# Each plot is a middle, a turn and an end that fit one another.
PLOTS: tuple[tuple[str, str, str], ...] = (
    (
        "[But|Then] {A_he} could not find {A_his} {thing}. {A_He} [looked|searched] [everywhere|"
        "under the table|behind the door]. {A_He} [felt|was] {bad}.",
        '[{B} came to help.|{B} saw {A_him} and came.|] "[Do not worry|Do not be {bad}|I can help '
        'you]," said {B}. [They looked|They searched] for the {thing} [together|until it was dark].',
        "[In the end|At last|Finally], they found it [under a table|behind a tree|near the door|in "
        "a box]. {A} was {good}.",
    ),
    (
        "[There|On the way], {A_he} [saw|found|noticed] {an_adj} {thing}[| on the road| under a "
        'tree]. "[Whose {thing} is this|Who left this {thing} here]?" [asked {A}|{A_he} asked].',
        '"[It is mine|That is my {thing}]," said {B}. "[I was looking for it|I lost it on {day}]."',
        "{A} gave {B_him} the {thing}. {B} [was {good}|smiled|thanked {A_him}]. [Then they played "
        "{game}.|They became friends.|]",
    ),
    (
        "[Suddenly|Then|After a while], {an_animal} came [out of the house|from behind a tree|along "
        "the road]. The {animal} [was|looked] hungry[| and {bad}].",
        "{A} [felt sorry for it|wanted to help]. {A_He} gave it some [{food}|water|milk|{food}].",
        "The {animal} [ate it all|was {good}|was not hungry now]. [After that|From that day], it "
        "[came back every {time}|was {A_his} friend|lived at the {place}].",
    ),
    (
        "There {A_he} met {B}, who was {a_job}. {B} [was|looked|seemed] {bad} because {B_he} had "
        "[lost|broken] {B_his} {thing}.",
        '"[Can I help you|What is wrong]?" asked {A}. "[I cannot work without my {thing}|I need my '
        '{thing}]," said {B}.',
        "So they [bought|found|made] a new {thing} together. {B} was very {good}[| and {A} was {good} too].",
    ),
    (
        "{A_He} [bought|got|found] {an_adj} {thing} and [put it in {A_his} bag|took it home|looked "
        "at it for a long time].",
        '[{B} wanted to see it.|{B} liked it too.] "[That is {an_adj} {thing}|What {an_adj} '
        '{thing}]!" said {B}.',
        "{A} [was {good}|smiled|was proud of the {thing}]. [They shared it.|They looked at it together.|]",
    ),
    (
        "[Soon|After an hour|Suddenly], it [began|started] to get [dark|cold]. {A} [was {bad}|"
        "wanted to go home|felt alone].",
        '{B} [opened the door|saw {A_him}] and said, "[Come in|You can stay here]." [They drank '
        "{drink}|They played {game}|They ate {food}] and [waited|talked].",
        "[Later|In the end|After {number} hours], the sun [came out|was warm again]. {A} [went|"
        "walked|ran] home.",
    ),
    (
        "{A_He} [wanted|tried] to make {food}, but {A_he} did not know how.",
        "{A} [asked|called] {B} for help. {B} was {B_trait} and [came at once|said yes]. First they "
        "[bought|washed] the {food}, and then they cooked it.",
        "[The {food} was very good.|Everyone liked the {food}.] {A} and {B} ate [it|everything] together.",
    ),
)
ENDINGS: tuple[str, ...] = (
    "",
    "",
    "",
    '"Thank you[|, {B}| very much]," said {A}.',
    "[That night|When {A_he} came home], {A} [told {A_his} mother about it|was tired but {good}|"
    "went to bed early|ate some {food}].",
    "{A} learned that [it is good to help|friends are important|it is good to share].",
    "[It was a good day.|It was a long day.|They were {good}.]",
)
DESCRIPTIONS: tuple[str, ...] = (
    "{A} has {an_animal}. The {animal} is {fur} and {size}. It likes to [eat {food}|sleep|run|"
    "play] at the {place}. [Every {time}|On {day}], {A} gives it [water|some food|milk].",
    "The {place} is {size}. {A} has {an_adj} {thing} there. [People|Children] go there "
    "[every {day}|in {season}|when it is {weather}]. [Many people like the {place}.|]",
    "{A} is {a_job}. {A_He} works [at the {place}|at the {place}] every {time}. {A_He} is {A_trait}"
    " and {A_his} friends [like|love] {A_him}. [After work, {A_he} drinks {drink}.|]",
    "My [friend|brother|sister|teacher] has {an_adj} {thing}. The {thing} is {color}. I [like|want"
    "|do not like] it because it is [{adj2}|very {adj2}].",
    "[In {season}|On {day}], the weather is {weather}. [The children play {game}|People drink "
    "{drink}|We stay at home|We go to the {place}]. [The {animal} sleeps in the {place2}.|]",
    "The {animal} is {size}[, but the {animal2} is not| and the {animal2} is {fur}]. [They live "
    "at the {place}|They are friends|They eat {food}]. The {animal} [can|cannot] [swim|run fast|"
    "jump|sing].",
    "There are {number} [books|apples|trees|boxes|birds|children] [in|near|behind] the {place}. "
    "[Some of them|All of them|Most of them] are {size}. [I can see them from the window.|]",
    "This is {A}. {A_He} is {number} years old. {A_He} has [a {B_sib}|a friend] [named|"
    "called] {B}. They [live|play|study] near the {place} together.",
    "The {thing} is [on|under|near|behind] the [table|chair|door|bed|window]. It is {adj} and "
    "{adj2}. It belongs to {A}.",
    "{A} has no money. {A_He} [cannot buy|sold] the {thing}. {A_He} will ask {A_his} father.",
    "{A} likes {color}. {A_His} {thing} is {color} and {A_his} {thing2} is {color} too.",
    "I [have|want|can see] {an_adj} {thing}. [It is in my bag.|It is on the table.|I got it in "
    "{season}.] My [mother|father|friend] has one too.",
    "During the {season}, {A} [visited|stayed in] the {place}. [Both {A_his} sister and {A_his} "
    "brother|{A_His} friends] [came too|were there]. They [swam|played|worked] all day.",
)
TALKS: tuple[str, ...] = (
    '"Where are you going[|, {A}]?" asked {B}. "[I am going to the {place}|I am going home]," '
    'said {A}. "[May I come with you|Can I come too]?" "[Yes, come with me|No, not today]," said '
    "{A}.",
    '"[Have you seen my {thing}?" {A} asked. "Yes, it|Where is my {thing}?" {A} asked. "It|Do '
    'you know where my {thing} is?" {A} asked. "I think it] is [at the {place}|under the table]," '
    "{B} [said|answered]. {A} [thanked {B_him}|was {good}|laughed].",
    '"I am [{bad}|hungry]," said {A}. "[Do you want some {food}|Would you like some {drink}]?" '
    'asked {B}. "[Yes, please|No, thank you]," said {A}.',
    '"What a {weather} {time}!" said {A}. "Let us [go to the {place}|play {game}|eat {food}]." '
    "{B} [said yes|said no|was {good}].",
    '"[What do you do|What is your job]?" {A} asked {B}. "I am {a_job}," {B_he} said. "I work in '
    'the {place}." "I would like to be {a_job} too," said {A}.',
    '"Why are you {bad}?" asked {B}. "[I lost my {thing}|I cannot find my {animal}|I do not want '
    'to go to the {place}]," said {A}. [{B} said nothing.|"I will help you," said {B}.]',
    '"Who is that [{B_man}|{B_kid}]?" asked {A}. "[That is|It is] {B}. {B_He} is {a_job}," said '
    "{A_his} [mother|father|friend].",
)
DAYS: tuple[str, ...] = (
    "{A} [wakes up|gets up] early every {day}. {A_He} eats {food} and drinks {drink}. Then {A_he} "
    "[goes|walks|runs] to the {place}. In the evening, {A_he} [reads a book|plays {game}|writes a "
    "letter|cooks dinner].",
    "{A} and {B} [played|were playing] {game} [in|near] the {place}. {A} won and {B} lost. {B} was "
    '{bad}, but {A} said, "[You will win next time|You played well]." [They played again.|]',
    "[Yesterday|Last {day}], {A} made {food} for {A_his} [family|friends]. {A_He} needed some "
    "{drink} and {food}. [Everyone|They] [liked it|ate it all].",
    "{A} [lost|could not find] {A_his} {thing}. {B} [said that|knew that] it was in the "
    "{place}. So {A_he} went there, and there it was. {A} was {good}.",
    "[When|After|As soon as] {A} [finished|had finished] {A_his} work, {A_he} [went|walked] to the "
    "{place}. {A_He} wanted to see the {animal}. The {animal} was [{fur}|{size}], and {A} liked "
    "it.",
    "If it is {weather} [tomorrow|on {day}], {A} will [go to|stay in|visit] the {place}. If not, "
    "{A_he} will [read|sleep|play {game}|help {A_his} mother].",
    "{A} wants to be {a_job} because {A_he} [likes|loves] [animals|people|children|books|music]. "
    "{A_His} [mother|father] is {a_job} too. {A_He} is very {A_trait}.",
    "{A} had {number} [apples|cookies|books|coins]. {A_He} kept [one|two] and shared the [rest|"
    "others] with {A_his} [friends|sister|brother|{animal}].",
    "It was late when {A} [returned|came] home. {A_He} had [sold|carried|made] {number} [cakes|"
    "boxes|baskets]. [Later|Soon|Then] {A_he} [sat near the window|read a book|was singing].",
    "{A} was thinking about {A_his} {thing}. {A_He} wished [for a new one|to see it again]. [Soon|"
    "The next day], {B} [lent {A_him} one|offered {A_him} {a_thing}|gladly helped {A_him}].",
    "Since it was {weather}, {A} [cooked {food}|wrote a letter|stayed at home]. Once {A_he} was "
    "ready, {A_he} [visited the {place}|threw the ball|sat at the {place}|helped {A_his} father].",
    "As soon as {A} reached the {place}, {A_he} [sat under a tree|threw a ball|saw {an_animal}]. "
    "[{A_He} stayed there for an hour.|{A_He} liked it there.|At first {A_he} was {bad}.]",
    "The {job} [worked|sat|was singing] at the {place}, where {A} [saw {an_animal}|found {a_thing}]. "
    "It was {weather}[| that {time}], [so|and] {A_he} [went home|left] [early|soon|late].",
)
