"""LangChain: two adapters of one server in one chain, the second one answers the first.

It needs ``pip install 'sglang-elora[clients]'``; run it by ``python examples/langchain_chain.py``.
"""

from __future__ import annotations

from demo_server import demo_server, parser
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

QUESTION = "Where does the train to the harbour leave?"


def main() -> None:
    with demo_server(parser(__doc__).parse_args()) as (url, names):

        def model(adapter: str) -> ChatOpenAI:
            return ChatOpenAI(
                model=f"demo:{adapter}",
                base_url=f"{url}/v1",
                api_key="none",
                temperature=0,
                max_completion_tokens=32,
            )

        first, second = names[:2]
        draft = ChatPromptTemplate.from_template("{question}") | model(first) | StrOutputParser()
        review = ChatPromptTemplate.from_template("Correct this: {draft}") | model(second)
        chain = {"draft": draft} | review | StrOutputParser()
        print(f"\n{QUESTION}")
        print(f"  {first}: {draft.invoke({'question': QUESTION})!r}")
        print(f"  {second}: {chain.invoke({'question': QUESTION})!r}")


if __name__ == "__main__":
    main()
