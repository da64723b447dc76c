--
-- PostgreSQL database dump
--


-- Dumped from database version 15.20 (Debian 15.20-0+deb12u1)
-- Dumped by pg_dump version 15.20 (Debian 15.20-0+deb12u1)

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: distillery_version; Type: TABLE; Schema: public; Owner: owner
--

CREATE TABLE public.distillery_version (
    version_num character varying(32) NOT NULL
);


ALTER TABLE public.distillery_version OWNER TO owner;

--
-- Name: leases; Type: TABLE; Schema: public; Owner: owner
--

CREATE TABLE public.leases (
    name character varying(200) NOT NULL,
    holder character varying(64) NOT NULL,
    run text NOT NULL,
    expires_at double precision NOT NULL
);


ALTER TABLE public.leases OWNER TO owner;

--
-- Name: teacher_answers; Type: TABLE; Schema: public; Owner: owner
--

CREATE TABLE public.teacher_answers (
    request_key character varying(64) NOT NULL,
    teacher text NOT NULL,
    answer character varying(1),
    distribution json,
    raw text NOT NULL,
    prompt_tokens integer NOT NULL,
    completion_tokens integer NOT NULL,
    latency_ms double precision NOT NULL,
    attempts integer NOT NULL,
    model_version text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    reason text DEFAULT ''::text NOT NULL,
    cached_tokens integer DEFAULT 0 NOT NULL,
    cost double precision,
    example_id text DEFAULT ''::text NOT NULL,
    prompt text DEFAULT ''::text NOT NULL
);


ALTER TABLE public.teacher_answers OWNER TO owner;

--
-- Data for Name: distillery_version; Type: TABLE DATA; Schema: public; Owner: owner
--

COPY public.distillery_version (version_num) FROM stdin;
0002
\.


--
-- Data for Name: leases; Type: TABLE DATA; Schema: public; Owner: owner
--

COPY public.leases (name, holder, run, expires_at) FROM stdin;
\.


--
-- Data for Name: teacher_answers; Type: TABLE DATA; Schema: public; Owner: owner
--

COPY public.teacher_answers (request_key, teacher, answer, distribution, raw, prompt_tokens, completion_tokens, latency_ms, attempts, model_version, created_at, reason, cached_tokens, cost, example_id, prompt) FROM stdin;
dbdda092666b63726aabbf8f33e58c5778ffdd49c5c9e4bb755fa3d1ee6962be	gpt-test	A	{"A": 0.8333333333333334, "B": 0.08333333333333333, "C": 0.08333333333333333}	A	40	1	45.32767199998489	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-2	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 2? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
b9798ba805b1353a961ae8556bc90004223602686daa85909b28063176ad1a08	gpt-test	B	{"A": 0.08333333333333333, "B": 0.8333333333333334, "C": 0.08333333333333333}	B	40	1	49.46979099986493	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-3	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 3? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
e3dec64267faa64f343351d361e4ccbcaf23f6f5ec8361ddbb3ac030c42211f6	gpt-test	C	{"A": 0.08333333333333333, "B": 0.08333333333333333, "C": 0.8333333333333334}	C	40	1	49.187318000122104	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-4	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 4? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
08a3b247e32794104641e3a55172d3d91ce15ac14bd5627c27bf5a3eb20d3c13	gpt-test	\N	\N	I can't tell.	40	1	54.553020000184915	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00	no option, or more than one, of A to C	0	\N	row-5	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 5? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
bae9de9a0d075e73f4188b69f769e1b6e3fdb680cb3efa6b5c893c6fefdf50de	gpt-test	B	{"A": 0.08333333333333333, "B": 0.8333333333333334, "C": 0.08333333333333333}	B	40	1	55.93813000018599	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-6	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 6? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
e29338d6d43baed1ae25f1748bc5cf4960123c741625d86bdeb6136a19e6b1e2	gpt-test	B	{"A": 0.08333333333333333, "B": 0.8333333333333334, "C": 0.08333333333333333}	B	40	1	64.27045300006284	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-0	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 0? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
f8a561d86ab1b50e476c36e1c3902956b49c553b2f1bff71a9f2491c4e93ae4f	gpt-test	C	{"A": 0.08333333333333333, "B": 0.08333333333333333, "C": 0.8333333333333334}	C	40	1	62.0823910001036	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-1	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 1? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
afd32a00de5c13c32c2efdea0dcea52798c8c16107692f5a1b28d616c3b1d78e	gpt-test	C	{"A": 0.08333333333333333, "B": 0.08333333333333333, "C": 0.8333333333333334}	C	40	1	52.17107699991175	1	teacher-2026-01-01	2026-11-27 17:10:46.899841+00		0	\N	row-7	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 7? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
d87558c2b70ccdfb9b006fc9679d2c79f33e84e4133ea632f0fe57d79eb5eaf2	gpt-test	A	{"A": 0.8333333333333334, "B": 0.08333333333333333, "C": 0.08333333333333333}	A	40	1	27.106132000199068	1	teacher-2026-01-01	2026-11-27 17:10:46.931119+00		0	\N	row-8	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 8? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
5bd1f7a01e027683cd75e72e64feb055791d35ba6e730aef4cc085c3be120e6d	gpt-test	B	{"A": 0.08333333333333333, "B": 0.8333333333333334, "C": 0.08333333333333333}	B	40	1	22.54085499998837	1	teacher-2026-01-01	2026-11-27 17:10:46.931119+00		0	\N	row-9	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 9? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
8150f3560bb23e0a6201a81156ba3bb0214d216fef08b7b2687ed92e28230af9	gpt-test	C	{"A": 0.08333333333333333, "B": 0.08333333333333333, "C": 0.8333333333333334}	C	40	1	21.588627000028282	1	teacher-2026-01-01	2026-11-27 17:10:46.931119+00		0	\N	row-10	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 10? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
d7b8a687f511ecc81c1fc3f2294d4967609173012b12249dc884a84909b8aa54	gpt-test	A	{"A": 0.8333333333333334, "B": 0.08333333333333333, "C": 0.08333333333333333}	A	40	1	16.515208999862807	1	teacher-2026-01-01	2026-11-27 17:10:46.931119+00		0	\N	row-11	Answer the following multiple-choice question by selecting the correct option.\n\nQuestion: What comes after 11? “é”\nAnswer Choices:\n(A) one\n(B) two\n(C) three
\.


--
-- Name: distillery_version distillery_version_pkc; Type: CONSTRAINT; Schema: public; Owner: owner
--

ALTER TABLE ONLY public.distillery_version
    ADD CONSTRAINT distillery_version_pkc PRIMARY KEY (version_num);


--
-- Name: leases leases_pkey; Type: CONSTRAINT; Schema: public; Owner: owner
--

ALTER TABLE ONLY public.leases
    ADD CONSTRAINT leases_pkey PRIMARY KEY (name);


--
-- Name: teacher_answers teacher_answers_pkey; Type: CONSTRAINT; Schema: public; Owner: owner
--

ALTER TABLE ONLY public.teacher_answers
    ADD CONSTRAINT teacher_answers_pkey PRIMARY KEY (request_key);


--
-- PostgreSQL database dump complete
--


